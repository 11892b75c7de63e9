"""Models that are evaluated with their weights packed, and how many parameters models have."""

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_chts.export.loading import load_sparse
from hf_chts.layers.packed_model import packed_layers
from hf_chts.sparse_model import SparsityHandle


def check_compute(compute: str) -> None:
    """Raises ValueError if `compute` is unknown, or "sparse" and several processes share the documents."""
    if compute not in ("dense", "sparse"):
        raise ValueError(f"compute is {compute!r}: choose 'dense', or 'sparse' for packed weights")
    if compute == "sparse" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "compute 'sparse' evaluates in one process: leave accelerate launch out, or choose compute 'dense'"
        )


def packed_model(source: str, revision: str, device: str, dtype: str) -> PreTrainedModel:
    """The model of an export with packed weights.

    Raises:
        FileNotFoundError, ValueError: see `load_sparse`; or the model was never sparse.
    """
    options: dict[str, Any] = {} if os.path.isdir(source) else {"revision": revision}
    if dtype != "auto":
        options["dtype"] = getattr(torch, dtype)
    model = load_sparse(source, compute="sparse", **options)
    return model.to(device)  # type: ignore[arg-type] # transformers' wrapper hides the signature


def number_of_parameters(model: PreTrainedModel) -> int:
    """As a dense model has them, whether the weights are packed or not."""
    packed = sum(layer.shape[0] * layer.shape[1] for layer in packed_layers(model).values())
    return model.num_parameters() + packed


def nonzero_parameters(model: PreTrainedModel) -> int:
    """`number_of_parameters` without the zeros in the weights of linear layers, which are missing links."""
    if (sparse := SparsityHandle.of(model)) is not None:
        return sparse.links() + sparse.dense_parameters()
    if packed := packed_layers(model):
        return model.num_parameters() + sum(layer.links for layer in packed.values())
    head = model.get_output_embeddings()
    weights = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    return model.num_parameters() - sum(w.numel() - int(w.count_nonzero()) for w in weights.values())

"""Models that are evaluated with their weights packed."""

import os
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_chts.export.loading import load_sparse
from hf_chts.layers.packed_model import packed_layers


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

"""The weights of a causal language model, sparse or dense, for a new run to start with."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.utils import cached_file

from hf_chts.config import SparsityConfig
from hf_chts.export.checksums import verify_checksums
from hf_chts.export.loading import load_sparse
from hf_chts.export.weight_files import PLAIN_STEM
from hf_chts.model_checks import check_causal
from hf_chts.names import listed
from hf_chts.sparse_model import SparsityHandle

_SAMPLED = 64  # values of each weight, for their digest


def load_weights(
    source: str, *, sparse: bool, sparsity: SparsityConfig | None = None, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A causal language model in float32, on the CPU.

    Args:
        source: a directory or a Hub id.
        sparse: whether it is an export of a sparse model, plain or packed, or a checkpoint of one.
        sparsity: the config to go on with, with its topology; None: the model becomes dense, with zeros where it has no
            links.

    Raises:
        FileNotFoundError, ValueError: weights are missing or damaged, or `source` is another kind of model; or see
            `load_sparse`.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": attn_implementation}
    with _not_split():
        model = load_sparse(source, sparsity=sparsity, **options) if sparse else _dense(source, options)
    handle = SparsityHandle.of(model)
    if handle is not None and sparsity is None:
        handle.unsparsify()
    kind: Any = AutoModelForCausalLM._model_mapping.get(type(model.config), None)
    if kind is None or not isinstance(model, kind):
        raise ValueError(f"{source} is a {type(model).__name__}, and not a causal language model")
    check_causal(model, source)
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError(
            "init: weights needs the whole model on each rank as training begins: set fsdp_cpu_ram_efficient_loading: "
            "false in the config of accelerate"
        )
    return model


@contextmanager
def _not_split() -> Iterator[None]:
    """Load a whole model where DeepSpeed's stage 3 would split it: the engine does so when it takes the model."""
    settings = deepspeed._hf_deepspeed_config_weak_ref
    config = None if settings is None else settings()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def _dense(source: str, options: dict[str, Any]) -> PreTrainedModel:
    if Path(source).is_dir():
        verify_checksums(Path(source), PLAIN_STEM)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights of {source} cannot be loaded: {error}") from error
    model, info = loaded
    # transformers has given them random values
    if missing := info["missing_keys"]:
        raise ValueError(
            f"{source} has no weights for {listed(sorted(missing))} of a {type(model).__name__}: name a causal "
            "language model whose files are whole"
        )
    return cast(PreTrainedModel, model)


def file_of(source: str, name: str) -> str | None:
    """The path of a file of a directory or a Hub id; None if it has none, or the Hub cannot be asked.

    Raises:
        OSError: there is no such Hub id, or it may not be read.
    """
    options: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    found = cached_file(source, name, **options)
    return None if found is None else str(found)


@torch.no_grad()
def weights_digest(model: PreTrainedModel) -> str:
    """A digest of some values of each weight, the same for any storage of links."""
    sparse = SparsityHandle.of(model)
    layers = {} if sparse is None else sparse.layers
    trained = {id(layer.parameter) for layer in layers.values()}
    others = [name for name, weight in model.named_parameters() if id(weight) not in trained]
    digest = hashlib.sha256()
    for name in sorted([*others, *(f"{layer}.weight" for layer in layers)]):
        layer = layers.get(name.removesuffix(".weight"))
        whole = model.get_parameter(name) if layer is None else cast(Tensor, layer.weight)
        weight = whole.detach().reshape(-1)
        some = weight[:: max(1, len(weight) // _SAMPLED)].to("cpu", torch.float32)
        digest.update(f"{name} {len(weight)} ".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]

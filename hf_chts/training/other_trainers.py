"""Trainer classes of other libraries: their order of arguments, models that they load by name, reference models.

A reference model, as trl's DPOTrainer has one, is a frozen copy of the model as it was before training.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import cached_file

from hf_chts.config import CONFIG_NAME, SparsityConfig
from hf_chts.layers.wrappers import original_name, unwrap
from hf_chts.sparse_model import SparsityHandle


def arguments_by_name(
    trainer: type, mixin: type, positional: Sequence[Any], named: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments of a trainer by their names, as the class after `mixin` takes them.

    A class that takes `*args` is assumed to pass them on to the next one.
    """
    names: list[str] = []
    order = trainer.__mro__
    for kind in order[order.index(mixin) + 1 :]:
        if "__init__" not in vars(kind):
            continue
        parameters = list(inspect.signature(vars(kind)["__init__"]).parameters.values())[1:]
        names += [x.name for x in parameters if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
        if not any(x.kind == x.VAR_POSITIONAL for x in parameters):
            break
    return dict(zip(names, positional, strict=False)) | dict(named or {})


def refuse_unloaded(model: str, sparsity: Any) -> None:
    """Raises ValueError if a trainer that loads `model` by name would lose its masks, or got a handle."""
    if isinstance(sparsity, SparsityHandle):
        raise ValueError(
            f"sparsity is the handle of a model, but {model!r} is yet to be loaded: pass a SparsityConfig, or "
            "the model that sparsify made sparse"
        )
    if _is_sparse(model):
        raise ValueError(
            f"{model!r} is a sparse model, and a trainer that loads it itself would not read its masks: pass "
            f"load_sparse({model!r}) as the model"
        )


def start_reference(trainer: Any, sparse: SparsityHandle, given: bool) -> None:
    """Copy the model's weights into a reference model that a trainer loaded by name.

    Under that name are the weights from before the model was made sparse or trained here. A reference that the user
    passed (`given`) stays as it is.

    Raises:
        ValueError: the reference has another architecture, or is sharded already.
    """
    if given or not sparse.layers:
        return
    reference = getattr(trainer, "ref_model", None)
    weights = list(reference.parameters()) if isinstance(reference, nn.Module) else []
    # under FSDP, trl has deleted a reference whose log probabilities it computed ahead
    ahead = trainer.is_fsdp_enabled and getattr(trainer.args, "precompute_ref_log_probs", False)
    if ahead or any(hasattr(weight, "ds_id") or hasattr(weight, "device_mesh") for weight in weights):
        name = getattr(trainer.model.config, "_name_or_path", "")
        if not _is_sparse(name):
            raise ValueError(
                f"{type(trainer).__name__} loaded its reference model from {name!r}, which is not sparse, and shards "
                "it: write the sparse model with export_sparse and train what load_sparse makes of that, or pass "
                "ref_model where the trainer takes one"
            )
        return
    if not isinstance(reference, nn.Module):
        return
    policy = {original_name(name): value for name, value in unwrap(trainer.model).state_dict().items()}
    inside = unwrap(reference)
    with torch.no_grad():
        for name, value in inside.state_dict().items():
            if name not in policy or policy[name].shape != value.shape:
                raise ValueError(
                    f"the reference model of {type(trainer).__name__} has {name}, the model has not: pass a ref_model "
                    "of the same architecture, or a model whose config names where it was loaded from"
                )
            value.copy_(policy[name])


def _is_sparse(model: str) -> bool:
    """Whether `model`, a directory or a Hub id, is an export or a checkpoint with masks."""
    try:
        path = cached_file(model, CONFIG_NAME)
    except (OSError, ValueError):  # not there; if the model is missing too, loading it will say so
        return False
    return path is not None and not SparsityConfig.load(path).is_dense

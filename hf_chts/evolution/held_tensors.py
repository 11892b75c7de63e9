"""The tensors of a run on this rank by name, to look for NaN and infinity in them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_chts.layers.sparse_layer import SparseLayer
from hf_chts.layers.stored_weights import StoredWeights
from hf_chts.layers.wrappers import original_name
from hf_chts.sharding.interface import Engine
from hf_chts.sharding.partitions import held_part

MASTER = "master weights or moments that the optimizer holds in parts"


def weights_of(model: nn.Module, *, frozen: bool = False) -> dict[str, list[Tensor]]:
    """This rank's part of each trained weight; with `frozen`, of every weight."""
    weights = model.named_parameters()
    return {original_name(name): [_held(weight)] for name, weight in weights if frozen or weight.requires_grad}


def weights_and_moments(model: nn.Module, optimizer: Any) -> dict[str, list[Tensor]]:
    """This rank's part of each trained weight and its optimizer state; DeepSpeed's partitions are under one name."""
    state: dict[Any, Any] = {}
    groups: list[dict[str, Any]] = []
    if optimizer is not None:
        while type(optimizer).__module__.startswith(("accelerate.", "deepspeed.")) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        state, groups = getattr(optimizer, "state", {}), getattr(optimizer, "param_groups", [])
    found = weights_of(model)
    own = set()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            own.add(id(weight))
            found[f"optimizer state of {original_name(name)}"] = _tensors(state.get(weight))
    # under ZeRO stage 3 the partitions are in the param_groups only during a step, but always in the state
    others = {id(weight): weight for weight in (*state, *(weight for group in groups for weight in group["params"]))}
    found[MASTER] = [
        tensor
        for key, weight in others.items()
        if key not in own and isinstance(weight, Tensor)
        for tensor in (_held(weight), *_tensors(state.get(weight)))
    ]
    return found


def read_by_update(
    layers: Mapping[str, SparseLayer], engine: Engine, stored: Mapping[str, StoredWeights]
) -> dict[str, list[Tensor]]:
    """This rank's part of everything that a topology update may read.

    Args:
        stored: the weights of removed links by layer name, if they are kept.
    """
    read: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():
        held = engine.held(layer)
        read[f"weight of {name}"] = [held[key] for key in ("weight", "working") if key in held]
        read[f"stored weights of {name}"] = stored[name].parts() if name in stored else []
        total = getattr(layer.dense_gradient, "sum", None)
        if total is not None and engine.loss_scale() != 1:
            # the infinity comes from the scaled loss, and the scaler has skipped the step
            total.nan_to_num_(0.0, 0.0, 0.0)
        read[f"dense gradient of {name}"] = [] if total is None else [total]
    return read


def _tensors(state: Any) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)] if isinstance(state, dict) else []


def _held(weight: Tensor) -> Tensor:
    # under ZeRO stage 3 the weight itself is empty, and its padding uninitialized
    return held_part(weight)[0] if hasattr(weight, "ds_tensor") else weight.detach()

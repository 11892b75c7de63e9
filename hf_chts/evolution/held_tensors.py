"""What a rank holds of a run's weights, optimizer state and gradients, by name; to look for NaN and infinity in it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_chts.layers.masked_layer import MaskedLayer
from hf_chts.layers.wrappers import original_name
from hf_chts.sharding.interface import Engine

MASTER = "master weights or moments that the optimizer holds in parts"


def weights_of(model: nn.Module, *, frozen: bool = False) -> dict[str, list[Tensor]]:
    """What this rank holds of each trained weight; with `frozen` of each weight."""
    weights = model.named_parameters()
    return {original_name(name): [_held(weight)] for name, weight in weights if frozen or weight.requires_grad}


def weights_and_moments(model: nn.Module, optimizer: Any) -> dict[str, list[Tensor]]:
    """What this rank holds of each trained weight and of its optimizer state; DeepSpeed's partitions under one name."""
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
    # under ZeRO stage 3 the param_groups have the partitions only during a step, and the state always
    others = {id(weight): weight for weight in (*state, *(weight for group in groups for weight in group["params"]))}
    found[MASTER] = [
        tensor
        for key, weight in others.items()
        if key not in own and isinstance(weight, Tensor)
        for tensor in (_held(weight), *_tensors(state.get(weight)))
    ]
    return found


def read_by_update(
    layers: Mapping[str, MaskedLayer], engine: Engine, stored: Mapping[str, Tensor]
) -> dict[str, list[Tensor]]:
    """What this rank holds of everything that a topology update may read.

    Args:
        stored: the weights of removed links, by layer name, where they are kept.
    """
    read: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():
        held = engine.held(layer)
        read[f"weight of {name}"] = [held[key] for key in ("weight", "working") if key in held]
        read[f"stored weights of {name}"] = [stored[name]] if name in stored else []
        total = getattr(layer.dense_gradient, "sum", None)
        if total is not None and engine.loss_scale() != 1:
            # infinity comes from the scaled loss then, and the scaler has skipped the step
            total.nan_to_num_(0.0, 0.0, 0.0)
        read[f"dense gradient of {name}"] = [] if total is None else [total]
    return read


def _tensors(state: Any) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)] if isinstance(state, dict) else []


def _held(weight: Tensor) -> Tensor:
    return getattr(weight, "ds_tensor", weight).detach()  # ZeRO stage 3 leaves the weight itself empty

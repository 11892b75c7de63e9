"""Which tensors of a run hold NaN or infinity: each rank reads what it holds, and all come to the same answer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_chts.finite import holds_not_finite
from hf_chts.layers.masked_layer import MaskedLayer
from hf_chts.layers.wrappers import original_name
from hf_chts.sharding.interface import Engine
from hf_chts.sharding.ranks import rank_and_world

_MOMENTS = "optimizer state of "
MASTER = "master weights or moments that the optimizer holds in parts"


@torch.no_grad()
def not_finite(tensors: Mapping[str, Sequence[Tensor]], device: torch.device) -> list[str]:
    """The names under which a tensor holds NaN or infinity, on any rank. Collective, with one wait for the device.

    Args:
        tensors: what this rank holds; the names, and their order, are the same on all ranks.
        device: one that ranks can talk over.
    """
    if not tensors:
        return []
    found = torch.stack([_any_not_finite(several, device) for several in tensors.values()]).to(torch.int32)
    if rank_and_world()[1] > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [name for name, bad in zip(tensors, found.tolist(), strict=True) if bad]


def weights_of(model: nn.Module, *, frozen: bool = False) -> dict[str, list[Tensor]]:
    """By name, what this rank holds of the weights that train, or of all: frozen ones can only have been so before."""
    weights = model.named_parameters()
    return {original_name(name): [_held(weight)] for name, weight in weights if frozen or weight.requires_grad}


def weights_and_moments(model: nn.Module, optimizer: Any) -> dict[str, list[Tensor]]:
    """The same, and what the optimizer keeps of each weight; of DeepSpeed's, its partitions under one name."""
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
            found[_MOMENTS + original_name(name)] = _tensors(state.get(weight))
    # ZeRO stage 3 shows its partitions to the optimizer in a step alone, and only its state has them always
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
    """By name, what this rank holds of all that a topology update may read.

    Args:
        stored: the weights of what is no link, by layer name, where they are kept.
    """
    read: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():
        held = engine.held(layer)
        read[f"weight of {name}"] = [held[key] for key in ("weight", "working") if key in held]
        read[f"stored weights of {name}"] = [stored[name]] if name in stored else []
        total = getattr(layer.dense_gradient, "sum", None)
        if total is not None and engine.loss_scale() != 1:
            # infinite because the loss is scaled, which is no divergence: the scaler has left out the step
            total.nan_to_num_(0.0, 0.0, 0.0)
        read[f"dense gradient of {name}"] = [] if total is None else [total]
    return read


def _tensors(state: Any) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)] if isinstance(state, dict) else []


def _held(weight: Tensor) -> Tensor:
    return getattr(weight, "ds_tensor", weight).detach()  # ZeRO stage 3 leaves the weight itself empty


def _any_not_finite(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Bool (), on `device`."""
    found = [bad.to(device) for tensor in tensors if (bad := holds_not_finite(tensor)) is not None]
    return torch.stack(found).any() if found else torch.zeros((), dtype=torch.bool, device=device)

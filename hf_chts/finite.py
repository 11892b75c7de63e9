"""NaN and infinity: which tensors hold them, and null in their place in JSON."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor], masking: Collection[str] = ()) -> list[str]:
    """The names of those tensors that hold NaN or infinity, in their order; of split tensors, in the part held here.

    The host waits once for each device.

    Args:
        masking: the names of tensors that may hold −∞, as masks that are added to scores do.
    """
    found: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (bad := holds_not_finite(tensor, masking=name in masking)) is not None:
            found.setdefault(bad.device, {})[name] = bad
    names = {
        name
        for bad in found.values()
        for name, is_bad in zip(bad, torch.stack(list(bad.values())).tolist(), strict=True)
        if is_bad
    }
    return [name for name in tensors if name in names]


@torch.no_grad()
def holds_not_finite(tensor: Tensor, *, masking: bool = False) -> Tensor | None:
    """Bool (), on the tensor's device, without a wait: whether it holds NaN or infinity; None where it cannot.

    −∞ does not count where the tensor may be `masking`.

    The tensor is read once, and no tensor of its size is made.
    """
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
    if local.is_complex():
        local = torch.view_as_real(local)
    if not local.is_floating_point() or not local.numel() or local.is_meta:
        return None
    if local.element_size() == 1:  # float8 has no arithmetic of its own
        local = local.float()
    least, largest = torch.aminmax(local)  # both NaN where a value is
    return ~(least < torch.inf) | (largest == torch.inf) if masking else ~(least.isfinite() & largest.isfinite())


def finite_or_null(value: Any) -> Any:
    """The contents of a JSON file, in which JSON has no word for NaN and infinity: they become None."""
    if isinstance(value, Mapping):
        return {name: finite_or_null(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

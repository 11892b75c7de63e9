"""Which tensors hold NaN or infinity, in this process or on any rank."""

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hf_chts.sharding.ranks import rank_and_world


@torch.no_grad()
def not_finite(
    tensors: Mapping[str, Tensor | Sequence[Tensor]],
    masking: Collection[str] = (),
    *,
    device: torch.device | None = None,
) -> list[str]:
    """The names under which a tensor holds NaN or infinity, in their order. Of a split tensor the local part is read.

    The host waits once for the device.

    Args:
        tensors: one or several by name.
        masking: the names of tensors that may hold −∞, as masks that are added to attention scores do.
        device: one that ranks communicate over. If it is given, the answer is that of all ranks together: collective,
            and the names and their order must be the same on all ranks.
    """
    extremes: dict[tuple[torch.device, torch.dtype, bool], list[tuple[int, Tensor, Tensor]]] = {}
    for number, (name, several) in enumerate(tensors.items()):
        for part in [several] if isinstance(several, Tensor) else several:
            if (ends := _extremes(part)) is not None:
                key = (ends[0].device, ends[0].dtype, name in masking)
                extremes.setdefault(key, []).append((number, *ends))
    where = device or next((of_device for of_device, *_ in extremes), None)
    if where is None or not tensors:
        return []
    # all tensors of a device together, since a model has many and each operation is launched
    bad = torch.zeros(len(tensors), dtype=torch.int32, device=where)
    for (_, _, infinity), found in extremes.items():
        numbers, lows, highs = zip(*found, strict=True)
        least, largest = torch.stack(lows), torch.stack(highs)
        fine = (least < torch.inf) & (largest != torch.inf) if infinity else least.isfinite() & largest.isfinite()
        bad.index_add_(0, torch.tensor(numbers).to(where), (~fine).to(where, torch.int32))
    if device is not None and rank_and_world()[1] > 1:
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return [name for name, is_bad in zip(tensors, bad.tolist(), strict=True) if is_bad]


def _extremes(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """The smallest and the largest value, both NaN if one is, on the tensor's device, without a wait; None if none is.

    The tensor is read once, and no tensor of its size is made.
    """
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
    if local.is_complex():
        local = torch.view_as_real(local)
    if not local.is_floating_point() or not local.numel() or _has_no_values(local):
        return None
    if local.element_size() == 1:  # float8 has no arithmetic of its own
        local = local.float()
    least, largest = torch.aminmax(local)
    return least, largest


def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta

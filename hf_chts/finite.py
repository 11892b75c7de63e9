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
    found: dict[str, list[Tensor]] = {}
    for name, several in tensors.items():
        parts = [several] if isinstance(several, Tensor) else several
        found[name] = [bad for part in parts if (bad := _holds_not_finite(part, masking=name in masking)) is not None]
    where = device or next((bad.device for several in found.values() for bad in several), None)
    if where is None or not found:
        return []
    none = torch.zeros((), dtype=torch.bool, device=where)
    bad = torch.stack([torch.stack([none, *(one.to(where) for one in several)]).any() for several in found.values()])
    if device is not None and rank_and_world()[1] > 1:
        bad = bad.to(torch.int32)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return [name for name, is_bad in zip(found, bad.tolist(), strict=True) if is_bad]


def _holds_not_finite(tensor: Tensor, *, masking: bool) -> Tensor | None:
    """Whether it holds NaN or infinity: bool (), on the tensor's device, without a wait; None if it cannot.

    The tensor is read once, and no tensor of its size is made.
    """
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
    if local.is_complex():
        local = torch.view_as_real(local)
    if not local.is_floating_point() or not local.numel() or local.is_meta:
        return None
    if local.element_size() == 1:  # float8 has no arithmetic of its own
        local = local.float()
    least, largest = torch.aminmax(local)  # both are NaN if a value is
    return ~(least < torch.inf) | (largest == torch.inf) if masking else ~(least.isfinite() & largest.isfinite())

"""Whether there are compiled loops, which numba makes (`pip install hf_chts[cpu]`)."""

from functools import cache
from types import ModuleType

import torch


@cache
def _module() -> ModuleType | None:
    try:
        from hf_chts.topology import loops
    except ImportError:
        return None
    return loops


def loops(device: torch.device) -> ModuleType | None:
    """The module `loops` for tensors on this device; None where torch's operations have to do."""
    return _module() if device.type == "cpu" else None

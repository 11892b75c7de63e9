"""Memory for weights that are read from end to end, again and again: in large pages where the system has them.

With pages of 4 KiB the processor looks up half a million of them for each token of a model of 2 GiB, and stops to read
ahead at the end of each.
"""

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE = 1 << 21  # bytes of a large page, on most processors
_SLAB = 1 << 26
_slabs = threading.local()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU that is not initialized. Small ones share memory, which is free when all of them are."""
    numel = 1
    for size in shape:
        numel *= size
    size = numel * dtype.itemsize
    if numel == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype)
    buffer, used = getattr(_slabs, "last", (None, 0))
    if buffer is None or used + size > len(buffer):
        buffer, used = _slab(max(size, _SLAB)), 0
    _slabs.last = (buffer, used + -(-size // 64) * 64)
    return torch.frombuffer(buffer, dtype=dtype, count=numel, offset=used).view(tuple(shape))


def release() -> None:
    """Begin a new piece of memory with the next tensor, so that the last one goes with its tensors."""
    _slabs.__dict__.pop("last", None)


def _slab(size: int) -> memoryview:
    """Fresh memory that begins with a large page. What is never written to takes no room."""
    # not shared with other processes, as mmap's default is, and which the system keeps in small pages
    whole = mmap.mmap(-1, size + _LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without
        whole.madvise(mmap.MADV_HUGEPAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    offset = -start % _LARGE
    return memoryview(whole)[offset : offset + size]

"""Triton kernels that write links into a dense weight, and read a dense gradient where the links are.

One program takes a block of slots. Positions are flat, in a weight of `columns` columns; the matrix in memory may have
longer rows, `stride` elements each. A slot without a link has a position past the last.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # slots of a program: enough loads in flight to hide the memory's latency, few enough registers


@triton.jit
def _place(positions, slots, numel, columns, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(slots of this program, where each one's link lies, whether it has a link, whether there is such a slot)."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = slot < slots
    position = tl.load(positions + slot, mask=real, other=0).to(tl.int64)
    row = position // columns
    return slot, position + row * (stride - columns), real & (position < numel), real


@triton.jit
def _write(matrix, positions, values, slots, numel, columns, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    slot, place, linked, real = _place(positions, slots, numel, columns, stride, BLOCK)
    value = tl.load(values + slot, mask=real, other=0)
    tl.store(matrix + place, value.to(matrix.dtype.element_ty), mask=linked)


@triton.jit
def _read(matrix, positions, values, slots, numel, columns, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    slot, place, linked, real = _place(positions, slots, numel, columns, stride, BLOCK)
    value = tl.load(matrix + place, mask=linked, other=0)
    tl.store(values + slot, value.to(values.dtype.element_ty), mask=real)


def write(matrix: Tensor, positions: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
    """Write the values of slots, (slots,), to their positions in a weight of this shape, cast to the matrix's dtype.

    Args:
        matrix: (rows, columns) or larger, contiguous; elsewhere it stays as it is.
        positions: integer (slots,); rows · columns or more for a slot without a link.
    """
    _launch(_write, matrix, positions, values, shape)


def read(matrix: Tensor, positions: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
    """Set `values`, (slots,), to what a matrix has at the positions, 0 for a slot without a link; see `write`."""
    _launch(_read, matrix, positions, values, shape)


def _launch(kernel, matrix: Tensor, positions: Tensor, values: Tensor, shape: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    slots, (rows, columns), device = positions.numel(), shape, matrix.device
    if slots:
        here = nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device.index)
        with here:
            kernel[(triton.cdiv(slots, _BLOCK),)](
                matrix, positions, values, slots, rows * columns, columns, matrix.stride(0), BLOCK=_BLOCK
            )

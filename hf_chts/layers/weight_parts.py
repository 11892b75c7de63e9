"""The dense weight of a layer that keeps a value for each of its links, made in parts for one product and dropped.

A weight has the layout of the plain layer: (out, in), or (in, out) for Conv1D, called (rows, columns) here. Its links
lie in slots, in no order: `positions` has the place of each in the flattened weight, and rows · columns for a slot
without a link.
"""

import functools
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_kept = threading.local()


@dataclass(frozen=True)
class Slots:
    """Where the slots of a layer lie in its weight.

    Attributes:
        positions: integer (slots,), see above.
        shape: (rows, columns) of the weight.
        transposed: whether the weight is (in, out).
        order: the slots by ascending position, integer (slots,), for a weight that is worked through in blocks of rows;
            None: it is made whole.
        block: the number of rows of a block.
    """

    positions: Tensor
    shape: tuple[int, int]
    transposed: bool = False
    order: Tensor | None = None
    block: int = 0

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def padded(self, x: Tensor) -> tuple[int, int]:
        """(rows, columns) that the weight is made with, the added ones 0, to be multiplied with `x`.

        Tensor cores want rows that begin at multiples of 16 bytes: with LLaMA-1B's width of 5,461, six layers take
        twice the time that they take with 5,464 (H200, bf16).
        """
        if self.order is not None or x.element_size() != 2 or kernels(x.device.type) is None:
            return self.shape
        return -(-self.shape[0] // 8) * 8, -(-self.shape[1] // 8) * 8


class Part(ABC):
    """Some rows of a weight, made at a time: all of them, or a block.

    Attributes:
        rows: which.
    """

    rows: slice

    @abstractmethod
    def fill(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows with these values of the slots, (slots,), and 0 where there is no link."""

    @abstractmethod
    def buffer(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A matrix of the part's shape to write a gradient into; it takes the place of what `fill` made."""

    @abstractmethod
    def gather(self, into: Tensor, gradient: Tensor) -> None:
        """Write what a matrix that `buffer` gave has at the links into their slots, 0 into slots without a link."""


@dataclass(frozen=True)
class _Block(Part):
    """A part that torch's own operators make.

    Attributes:
        columns: of the weight.
        index: int64, the places of the links in the flattened part; rows · columns for a slot without a link.
        chosen: the slots that `index` is of; None: all.
    """

    rows: slice
    columns: int
    index: Tensor
    chosen: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns

    def fill(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        dense = kept_buffer(self.shape[0] * self.columns + 1, dtype, values.device).zero_()
        values = values.detach() if self.chosen is None else values.detach()[self.chosen]
        dense.index_copy_(0, self.index, values.to(dtype))
        return dense[:-1].view(self.shape)

    def buffer(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        dense = kept_buffer(self.shape[0] * self.columns + 1, dtype, device)
        dense[-1] = 0  # what slots without a link get
        return dense[:-1].view(self.shape)

    def gather(self, into: Tensor, gradient: Tensor) -> None:
        flat = gradient.as_strided((gradient.numel() + 1,), (1,))
        found = flat.take(self.index).to(into.dtype)
        if self.chosen is None:
            into.copy_(found)
        else:
            into[self.chosen] = found


@dataclass(frozen=True)
class _Whole(Part):
    """A whole weight that Triton's kernels make, padded to `shape`."""

    rows: slice
    shape: tuple[int, int]
    slots: Slots
    kernels: ModuleType

    def fill(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        matrix = torch.zeros(self.shape, dtype=dtype, device=values.device)
        self.kernels.write(matrix, self.slots.positions, values.detach(), self.slots.shape)
        return matrix

    def buffer(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(self.shape, dtype=dtype, device=device)

    def gather(self, into: Tensor, gradient: Tensor) -> None:
        self.kernels.read(gradient, self.slots.positions, into, self.slots.shape)


def parts(slots: Slots, x: Tensor) -> Iterator[Part]:
    """The parts of a weight that is multiplied with `x`, one after the other."""
    rows, columns = slots.shape
    if slots.order is None:
        found = kernels(x.device.type)
        if found is not None:
            shape = slots.padded(x)
            yield _Whole(slice(0, shape[0]), shape, slots, found)
        else:
            yield _Block(slice(0, rows), columns, slots.positions.long(), None)
        return
    order = slots.order.long()
    ordered = slots.positions.long()[order]
    starts = torch.arange(0, rows + slots.block, slots.block, device=ordered.device).clamp_(max=rows)
    bounds = torch.searchsorted(ordered, starts * columns).tolist()
    for (start, stop), (first, last) in zip(pairwise(starts.tolist()), pairwise(bounds), strict=True):
        yield _Block(slice(start, stop), columns, ordered[first:last] - start * columns, order[first:last])


@functools.cache
def kernels(kind: str) -> ModuleType | None:
    """The module of Triton's kernels, if they run on this kind of device; else torch's operators do the same.

    Triton comes with PyTorch for CUDA, ROCm and XPU; it wants a C compiler, which not every machine has.
    """
    if kind not in ("cuda", "xpu"):
        return None
    try:
        from hf_chts.layers import triton_kernels  # late, because not every torch comes with Triton

        matrix, values = torch.zeros(1, 2, device=kind), torch.ones(1, device=kind)
        triton_kernels.write(matrix, torch.ones(1, dtype=torch.int32, device=kind), values, (1, 2))
        triton_kernels.read(matrix, torch.zeros(1, dtype=torch.int32, device=kind), values, (1, 2))
        assert matrix.tolist() == [[0, 1]]
        assert values.tolist() == [0]
    except Exception as error:  # whatever it is that Triton lacks
        _log.warning("Triton's kernels do not run here (%s): links storage takes torch's own operators", error)
        return None
    return triton_kernels


def kept_buffer(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for one product, flat; the next product of this thread writes over it.

    A CPU maps fresh memory for every large tensor page by page, which takes longer than to fill it (2048 x 5461 fp32:
    9 ms against 2), so each thread keeps what its largest layer needs. A GPU's allocator keeps it itself.
    """
    if device.type != "cpu" or torch._C._len_torch_dispatch_stack():  # a mode makes tensors of its own
        return torch.empty(numel, dtype=dtype, device=device)
    kept: dict[Any, Tensor] = _kept.__dict__
    if dtype not in kept or kept[dtype].numel() < numel:
        kept.pop(dtype, None)
        with torch.inference_mode(False):
            kept[dtype] = torch.empty(numel, dtype=dtype)
    return kept[dtype][:numel]

"""The links of a layer in the order of its products: made once for each version of its topology."""

import functools
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_chts import kernels

# the widest tile of tokens that products take, in float32
_TOKEN_BYTES = 64 * 4


@dataclass(frozen=True)
class Direction:
    """The links as one product goes through them: by (block of columns, row, column).

    Attributes:
        columns: the column of each link, int16 read without sign, or int32: (slots,), of which the links come first.
        slots: the slot of each link, int32 (slots,).
        starts: the first link of each row in each block, and the number of links: int64 (blocks · rows + 1,).
        shape: (rows, columns).
        block: the number of columns of a block.
    """

    columns: Tensor
    slots: Tensor
    starts: Tensor
    shape: tuple[int, int]
    block: int

    @classmethod
    def empty(cls, slots: int, shape: tuple[int, int]) -> "Direction":
        rows, columns = shape
        block = _block(columns)
        kind = torch.int16 if columns <= 2**16 else torch.int32
        return cls(
            torch.zeros(slots, dtype=kind),
            torch.zeros(slots, dtype=torch.int32),
            torch.zeros(-(-columns // block) * rows + 1, dtype=torch.int64),
            shape,
            block,
        )

    @property
    def blocks(self) -> int:
        return -(-self.shape[1] // self.block)

    @property
    def count(self) -> int:
        """The number of links."""
        return int(self.starts[-1])

    def column_numbers(self) -> Tensor:
        """The column of each link: int64 (links,)."""
        numbers = self.columns[: self.count].long()
        return numbers & 0xFFFF if self.columns.dtype == torch.int16 else numbers

    def positions(self) -> Tensor:
        """Row · columns + column of each link: int64 (links,)."""
        rows, columns = self.shape
        row = torch.arange(rows).repeat(self.blocks).repeat_interleave(self.starts.diff())
        return row * columns + self.column_numbers()

    @property
    def tensors(self) -> list[Tensor]:
        return [self.columns, self.slots, self.starts]

    def sort(self, positions: Tensor, turned: bool) -> None:
        """What hf_chts/kernels/link_order.py does, with torch's operators.

        Args:
            positions: integer (slots,): row · columns + column for each slot, of the transposed links if `turned`.
        """
        rows, columns = self.shape
        slots = (positions < rows * columns).nonzero()[:, 0]
        there = positions[slots].long()
        row, column = (there % rows, there // rows) if turned else (there // columns, there % columns)
        place = column // self.block * rows + row
        order = (place * columns + column).argsort()
        self.slots[: len(slots)] = slots[order].int()
        self.columns[: len(slots)] = column[order].int().to(self.columns.dtype)
        counts = torch.bincount(place, minlength=self.blocks * rows)
        self.starts[0], self.starts[1:] = 0, counts.cumsum(0)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        columns = self.columns.numpy()
        return (
            columns.view(np.uint16) if columns.dtype == np.int16 else columns,
            self.slots.numpy(),
            self.starts.numpy(),
        )


@dataclass
class LinkIndex:
    """Both directions of a layer's links. An update of the topology changes the tensors in place.

    Attributes:
        forward: rows are outputs, columns inputs.
        backward: rows are inputs, columns outputs.
        version: of the storage that it was made for.
        by_torch: whether torch's own sparse products take it, for want of numba.
    """

    forward: Direction
    backward: Direction
    version: int = -1
    by_torch: bool = False

    @classmethod
    def empty(cls, slots: int, shape: tuple[int, int]) -> "LinkIndex":
        """An index of no links, of a layer of `shape`, (out, in)."""
        directions = (Direction.empty(slots, shape), Direction.empty(slots, (shape[1], shape[0])))
        return cls(*directions, by_torch=not kernels.available())

    def refresh(self, positions: Tensor, transposed: bool, version: int) -> None:
        """Take over the links.

        Args:
            positions: integer (slots,) on the CPU, in the layout of the weight: (in, out) if it is `transposed`.
        """
        by_row, by_column = (self.backward, self.forward) if transposed else (self.forward, self.backward)
        if not self.by_torch:
            from hf_chts.kernels.link_order import order_links  # late: imports numba

            blocks = (by_column.block, by_row.block)
            order_links(positions.numpy(), *by_row.shape, blocks, by_row.arrays(), by_column.arrays())
        else:
            by_row.sort(positions, turned=False)
            by_column.sort(positions, turned=True)
        for tensor in (*self.forward.tensors, *self.backward.tensors):
            torch.autograd.graph.increment_version(tensor)  # so that a backward pass of older links says so
        self.version = version

    @property
    def slots(self) -> int:
        return self.forward.slots.numel()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for each in (self.forward, self.backward) for tensor in each.tensors)


def _block(features: int) -> int:
    """How many features of a tile stay in half of a core's second cache, in blocks of one size."""
    if not kernels.available():  # torch's sparse products know nothing of blocks
        return features
    most = max(64, _second_cache() // 2 // _TOKEN_BYTES)
    blocks = -(-features // most)
    return max(1, -(-features // blocks))


@functools.cache
def _second_cache() -> int:
    """Bytes; one MiB where the system does not tell."""
    try:
        size = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (AttributeError, ValueError, OSError):
        size = 0
    return min(max(size, 256 * 1024), 4 * 1024 * 1024) if size > 0 else 1024 * 1024

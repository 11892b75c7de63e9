"""The links of a weight in lanes: sixteen rows of the weight side by side, one link of each in a step.

A processor works on sixteen numbers at a time, so each of its lanes follows one row (one output of the layer). The rows
are sorted by their number of links, sixteen neighbours make a group, and a group has as many steps as its longest row
has links. A link is its value, and how many columns it is after the link before it in its row (8 bits, or 16 where that
takes fewer bytes). A gap that does not fit is bridged by links of value 0, and so is the end of a shorter row.

    values  (steps, 16)    the dtype of the weight
    gaps    (steps, 16)    uint8 or uint16 (torch's operators know it as int16)
    starts  (groups + 1,)  int64: the first step of each group, and the number of steps
    rows    (groups, 16)   int32: which row is in the lane, -1: none
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_chts.layers.pages import empty

LANES = 16


@dataclass(frozen=True)
class Lanes:
    """See above.

    Attributes:
        shape: (rows, columns) of the weight: outputs and inputs of the layer.
    """

    values: Tensor
    gaps: Tensor
    starts: Tensor
    rows: Tensor
    shape: tuple[int, int]

    NAMES: ClassVar[tuple[str, ...]] = ("values", "gaps", "starts", "rows")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.gaps, self.starts, self.rows

    @property
    def groups(self) -> int:
        return self.rows.shape[0]

    def dense(self) -> Tensor:
        """The weight, (rows, columns), 0 off the links."""
        row, column = self.places()
        rows, columns = self.shape
        flat = self.values.new_zeros(rows * columns)
        kept = row >= 0
        # of a link and the fillers that bridge the way to it or follow it, none has the place of another link; a filler
        # after the last link has the link's own place, and adds 0
        flat.index_add_(0, row[kept] * columns + column[kept], self.values.reshape(-1)[kept])
        return flat.view(rows, columns)

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of everything in the lanes, int64 (steps · 16,) each; row -1 in lanes without one."""
        gaps = self.gaps.long() & (0xFF if self.gaps.element_size() == 1 else 0xFFFF)
        until = torch.cat([gaps.new_zeros(1, LANES), gaps.cumsum(0)])
        lengths = self.starts.diff()
        before = until[self.starts[:-1]].repeat_interleave(lengths, 0)
        return self.rows.long().repeat_interleave(lengths, 0).view(-1), (until[1:] - before).view(-1)


def arrange(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Lanes:
    """Links, sorted by row and by column within it, in lanes.

    Args:
        rows, columns: int64 (links,), on the CPU.
        values: (links,).
        shape: (rows, columns) of the weight.
    """
    row, column = rows.numpy(), columns.numpy()
    gaps = np.diff(column, prepend=0)
    first = np.flatnonzero(np.diff(row, prepend=-1))
    gaps[first] = column[first]
    plans = [_Plan(row, gaps, largest, shape[0]) for largest in (0xFF, 0xFFFF)]
    plan = min(plans, key=lambda plan: plan.steps * (values.element_size() + plan.width))
    shapes = (plan.steps, LANES)
    packed = empty(shapes, values.dtype).zero_()
    found = empty(shapes, torch.uint8 if plan.width == 1 else torch.int16).zero_()
    numbers = found.view(-1).numpy() if plan.width == 1 else found.view(-1).numpy().view(np.uint16)
    plan.write(row, gaps, numbers)
    packed.view(-1)[torch.from_numpy(plan.places)] = values
    lanes = np.full(len(plan.starts[1:]) * LANES, -1, dtype=np.int32)
    lanes[: shape[0]] = plan.order
    return Lanes(packed, found, torch.from_numpy(plan.starts), torch.from_numpy(lanes).view(-1, LANES), shape)


class _Plan:
    """Where links go if gaps are up to `largest`.

    Attributes:
        width: bytes of a gap.
        order: the rows, by falling number of links.
        starts: the first step of each group, and the number of steps.
    """

    def __init__(self, row: np.ndarray, gaps: np.ndarray, largest: int, rows: int) -> None:
        self.width, self.largest = (1, largest) if largest < 256 else (2, largest)
        self.fillers = np.maximum(gaps - 1, 0) // largest  # before each link
        self.needed = np.bincount(row, minlength=rows) + np.bincount(row, self.fillers, minlength=rows).astype(np.int64)
        self.order = np.argsort(-self.needed, kind="stable")
        longest = self.needed[self.order][::LANES]  # the first of each group
        self.starts = np.concatenate([[0], np.cumsum(longest)])
        self.steps = int(self.starts[-1])

    def write(self, row: np.ndarray, gaps: np.ndarray, into: np.ndarray) -> None:
        """Write the gaps of links and fillers, and find the `places` of the links, in the flattened lanes."""
        rank = np.empty(len(self.order), dtype=np.int64)
        rank[self.order] = np.arange(len(self.order))
        until = np.cumsum(self.fillers + 1)
        before_row = np.concatenate([[0], np.cumsum(self.needed)])[:-1]
        step = until - 1 - before_row[row] + self.starts[rank[row] // LANES]
        self.places = step * LANES + rank[row] % LANES
        into[self.places] = gaps - self.fillers * self.largest
        bridged = np.flatnonzero(self.fillers)
        counts = self.fillers[bridged]
        last = np.repeat(self.places[bridged], counts)
        back = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + 1
        into[last - back * LANES] = self.largest

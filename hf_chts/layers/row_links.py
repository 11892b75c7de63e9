"""The links of a weight row by row, as a GPU reads them: one program takes one row.

values   (n,)        the dtype of the weight
columns  (n,)        int16 up to 32,768 columns, else int32
starts   (rows + 1,) int32 or int64: where each row begins; rows begin at multiples of 8, and are filled up with
                     links of value 0
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

_STEP = 8  # so that loads of 16 bytes are aligned


@dataclass(frozen=True)
class RowLinks:
    """See above.

    Attributes:
        shape: (rows, columns) of the weight: outputs and inputs of the layer.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    shape: tuple[int, int]

    NAMES: ClassVar[tuple[str, ...]] = ("values", "columns", "starts")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.columns, self.starts

    def dense(self) -> Tensor:
        """The weight, (rows, columns), 0 off the links."""
        row, column = self.places()
        flat = self.values.new_zeros(self.shape[0] * self.shape[1])
        flat.index_add_(0, row * self.shape[1] + column, self.values)
        return flat.view(self.shape)

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of all that is stored, int64 (n,) each."""
        rows = torch.arange(self.shape[0], device=self.starts.device)
        return rows.repeat_interleave(self.starts.diff().long()), self.columns.long()

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> "RowLinks":
        """Links, sorted by row; int64 (links,) twice, and (links,)."""
        degrees = rows.bincount(minlength=shape[0])
        padded = (degrees + _STEP - 1) // _STEP * _STEP
        starts = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
        total = int(starts[-1])
        before = degrees.cumsum(0) - degrees
        place = starts[rows] + torch.arange(len(rows), device=rows.device) - before[rows]
        found = columns.new_zeros(total, dtype=torch.int16 if shape[1] <= 1 << 15 else torch.int32)
        found[place] = columns.to(found.dtype)
        numbers = values.new_zeros(total)
        numbers[place] = values
        return cls(numbers, found, starts.to(torch.int32 if total < 2**31 else torch.int64), shape)

"""Whether there are compiled loops, which numba makes (`pip install hf_chts[cpu]`)."""

from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from hf_chts import kernels


@cache
def _module() -> ModuleType | None:
    if not kernels.available():
        return None
    from hf_chts.topology import loops  # late: imports numba

    return loops


def loops(device: torch.device) -> ModuleType | None:
    """The module `loops` for tensors on this device; None where torch's operations have to do."""
    return _module() if device.type == "cpu" else None


def neighbours_of(
    compiled: ModuleType, positions: Tensor, rows: int, columns: int
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """The links of each node, as `loops.neighbours` has them.

    Args:
        compiled: the module `loops`.
        positions: of the links in (rows, columns), int64 (links,), ascending.

    Returns:
        ((first, neighbour, degree), (by_row, by_column)).
    """
    degree = np.zeros(rows + columns, np.int64)
    lists = (np.empty_like(degree), np.empty(2 * len(positions), np.int32), degree)
    words = tuple(
        np.zeros((nodes, -(-others // 64)), np.uint64) for nodes, others in ((rows, columns), (columns, rows))
    )
    compiled.neighbours(positions.numpy(), rows, columns, *lists, *words)
    return lists, words

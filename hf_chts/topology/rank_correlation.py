"""How far two scores agree on the order of links."""

import math

import torch
from torch import Tensor


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation, in [−1, 1]: Pearson's over the ranks, where equals share the mean of theirs.

    NaN where all values of one side are equal, as there is no order to agree on.

    Args:
        first, second: (n,), of one length, n >= 2, without NaN.

    Raises:
        ValueError: not two vectors of one length >= 2, or NaN among the values.
    """
    if first.dim() != 1 or first.shape != second.shape or len(first) < 2:
        raise ValueError(
            f"a rank correlation takes two vectors of one length, 2 at least; got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    if first.isnan().any() or second.isnan().any():
        raise ValueError("NaN has no rank: leave out the places where either side is NaN")
    x, y = _average_ranks(first), _average_ranks(second)
    x, y = x - x.mean(), y - y.mean()
    length = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / length if length else math.nan


def _average_ranks(values: Tensor) -> Tensor:
    """float64 (n,): the ranks 1 to n, equals with the mean of those that they take up."""
    _, which, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(torch.float64)
    return (last - (counts - 1) / 2)[which]

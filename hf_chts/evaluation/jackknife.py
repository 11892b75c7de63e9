"""Standard errors from how much a score changes when each document in turn is left out (the jackknife).

It works for every smooth score: a mean gets its usual standard error, and ratios, perplexities, F1 and Matthews
correlations the one of the delta method. It needs no random numbers, and the differences of two models over the same
documents have a paired standard error.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]


def means_without_each(values: Sequence[float]) -> Values:
    """The mean of all values but the i-th, for every i; (n,)."""
    array = np.asarray(values, dtype=np.float64)
    return (array.sum() - array) / (len(array) - 1)


def ratios_without_each(numerators: Sequence[float], denominators: Sequence[float]) -> Values:
    """Sum of the numerators over sum of the denominators, both without the i-th, for every i; (n,)."""
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    return (above.sum() - above) / (below.sum() - below)


def scores_without_each(items: Sequence[Hashable], score: Callable[[list[Hashable]], float]) -> Values:
    """`score` of all items but the i-th, for every i; (n,). Called once per *different* item."""
    found: dict[Hashable, float] = {}
    for item in dict.fromkeys(items):
        others = list(items)
        others.remove(item)
        found[item] = score(others)
    return np.array([found[item] for item in items], dtype=np.float64)


def standard_error(without_each: Sequence[float] | Values) -> float | None:
    """The jackknife's standard error: sqrt((n − 1) / n · Σ (θᵢ − mean θ)²); None for fewer than two documents."""
    array = np.asarray(without_each, dtype=np.float64)
    if len(array) < 2:
        return None
    return math.sqrt((len(array) - 1) / len(array) * float(((array - array.mean()) ** 2).sum()))

"""Standard errors without resampling: how much a score changes when each document in turn is left out.

One mechanism for every score that is smooth in the documents' shares: for a mean it gives the usual standard error, for
ratios, perplexities, F1 and Matthews correlations what the delta method gives. It draws no random numbers, and the
difference of two models over the same documents has the error of the differences, which is the paired one.
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
    """Sum of the numerators over sum of the denominators, of all but the i-th, for every i; (n,)."""
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    return (above.sum() - above) / (below.sum() - below)


def scores_without_each(items: Sequence[Hashable], score: Callable[[list[Hashable]], float]) -> Values:
    """`score` of all items but the i-th, for every i; (n,). It is called once per *different* item."""
    found: dict[Hashable, float] = {}
    for item in dict.fromkeys(items):
        others = list(items)
        others.remove(item)
        found[item] = score(others)
    return np.array([found[item] for item in items], dtype=np.float64)


def standard_error(without_each: Sequence[float] | Values) -> float | None:
    """The jackknife's standard error: sqrt((n − 1) / n · Σ (θᵢ − mean θ)²); None for less than two documents."""
    array = np.asarray(without_each, dtype=np.float64)
    if len(array) < 2:
        return None
    return math.sqrt((len(array) - 1) / len(array) * float(((array - array.mean()) ** 2).sum()))

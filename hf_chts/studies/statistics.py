"""Means over seeds and their standard errors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# about 95% of a normal distribution; with three values, whose error is itself estimated, 82%
ERRORS_OUTSIDE = 2.0
# Student's t: a mean of 3, 4, … values is so many of its errors from the true one in 5 cases of 100
_ERRORS_IN_5_OF_100 = (4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True)
class Estimate:
    """A mean of independent values.

    Attributes:
        mean: of the values.
        error: its standard error; None of a single value, which says nothing of its own error.
        count: how many values.
    """

    mean: float
    error: float | None
    count: int

    @property
    def outside(self) -> bool | None:
        """Whether the mean is more than two standard errors from 0; None of fewer than three values.

        The error of two is known so badly that chance alone does it in 30 cases of 100.
        """
        return None if self.error is None or self.count < 3 else abs(self.mean) > ERRORS_OUTSIDE * self.error

    @property
    def significant(self) -> bool:
        """Whether chance alone puts the mean so far from 0 in fewer than 5 cases of 100, by Student's t."""
        if self.error is None or self.count < 3:
            return False
        errors = _ERRORS_IN_5_OF_100[min(self.count - 3, len(_ERRORS_IN_5_OF_100) - 1)]
        return abs(self.mean) > errors * self.error


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of `values` and its standard error, sd/√n with n−1 in the standard deviation; None of no values."""
    count = len(values)
    if not count:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count), count)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """The mean difference, `values` minus `reference`, over the seeds that both have; None if they share no seed.

    What a seed does to both (data order, initial weights) is not in the error.
    """
    return estimate([values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())])


def difference_to(found: Estimate, published: float, error: float | None = None) -> Estimate:
    """`found` minus a published figure; without an error where one of the two has none."""
    joined = None if found.error is None or error is None else math.hypot(found.error, error)
    return Estimate(found.mean - published, joined, found.count)

"""Means over seeds and their standard errors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# about 95% of a normal distribution; with three values, whose error is itself estimated, 82%
ERRORS_OUTSIDE = 2.0


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
        """Whether the mean is more than two standard errors from 0; None without an error."""
        return None if self.error is None else abs(self.mean) > ERRORS_OUTSIDE * self.error


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


def difference_to(found: Estimate, published: float, error: float = 0.0) -> Estimate:
    """`found` minus a published figure with an error of its own; without an error where `found` has none."""
    joined = None if found.error is None else math.hypot(found.error, error)
    return Estimate(found.mean - published, joined, found.count)

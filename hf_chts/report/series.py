"""Curves out of a log, and what words say of them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

LONGEST = 400  # points of a curve; more are not to be told apart, and make the report heavy


@dataclass(frozen=True)
class Series:
    """Values by step, in order of the steps; never empty where `of` made it."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, entries: Iterable[Mapping[str, Any]], key: str) -> "Series | None":
        """The finite values of `key` in the entries that have it; None if none has. Of one step the last counts."""
        points = {}
        for entry in entries:
            value = entry.get(key)
            if isinstance(value, int | float) and math.isfinite(value):
                points[entry["step"]] = float(value)
        return cls(tuple(sorted(points)), tuple(points[step] for step in sorted(points))) if points else None

    @property
    def last(self) -> float:
        return self.values[-1]

    def thinned(self, longest: int = LONGEST) -> "Series":
        """At most `longest` points, each the mean of neighbours, of as many as the others or one more."""
        if len(self.steps) <= longest:
            return self
        steps, values = (np.array_split(np.asarray(part, dtype=float), longest) for part in (self.steps, self.values))
        return Series(tuple(round(part.mean()) for part in steps), tuple(float(part.mean()) for part in values))

    def told(self, name: str, form: str = ".2f") -> str:
        """In words: where the curve begins and ends."""
        first, last = (f"{value:{form}}" for value in (self.values[0], self.last))
        if len(self.steps) == 1:
            return f"{name} is {last} at step {self.steps[0]}"
        if first == last:
            return f"{name} is {first} at step {self.steps[0]} and {last} again at step {self.steps[-1]}"
        verb = "falls" if self.last < self.values[0] else "rises"
        return f"{name} {verb} from {first} at step {self.steps[0]} to {last} at step {self.steps[-1]}"

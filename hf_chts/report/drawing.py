"""A curve out of a log, a figure, and the words that go with them."""

import base64
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_chts.plotting import COLOURS, DASHES, MARKERS, encoded, look

LONGEST = 400  # points of a curve; more cannot be seen, and make the report heavy


@dataclass(frozen=True)
class Series:
    """Values by step, in order of the steps. Made by `of`, it has at least one."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, entries: Iterable[Mapping[str, Any]], key: str) -> "Series | None":
        """The finite values of `key` in the entries that have it, the last one of each step; None if there are none."""
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
        """At most `longest` points, each the mean of an equal number (to within one) of neighbours."""
        if len(self.steps) <= longest:
            return self
        steps, values = (np.array_split(np.asarray(part, dtype=float), longest) for part in (self.steps, self.values))
        return Series(tuple(round(part.mean()) for part in steps), tuple(float(part.mean()) for part in values))

    def in_words(self, name: str, form: str = ".2f") -> str:
        """Where the curve begins and ends."""
        first, last = (f"{value:{form}}" for value in (self.values[0], self.last))
        if len(self.steps) == 1:
            return f"{name} is {last} at step {self.steps[0]}"
        if first == last:
            return f"{name} is {first} at step {self.steps[0]} and {last} again at step {self.steps[-1]}"
        verb = "falls" if self.last < self.values[0] else "rises"
        return f"{name} {verb} from {first} at step {self.steps[0]} to {last} at step {self.steps[-1]}"


@dataclass(frozen=True)
class Drawing:
    """A figure and its words.

    Attributes:
        name: of its file, without the ending.
        title: a few words.
        caption: how to read it.
        alt: what it shows, for those who do not see it.
        figure: drawn under `look()`.
        kind: svg for lines; png for pictures of many cells.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure
    kind: Literal["svg", "png"] = "svg"

    def encoded(self, kind: str) -> bytes:
        """The figure as the contents of a file of this kind."""
        with look():
            return encoded(self.figure, kind)

    @property
    def data_url(self) -> str:
        """The figure as the `src` of an image."""
        media_type = "image/svg+xml" if self.kind == "svg" else "image/png"
        return f"data:{media_type};base64,{base64.b64encode(self.encoded(self.kind)).decode()}"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in CSS pixels, so that the page does not jump while it is laid out."""
        width, height = self.figure.get_size_inches()
        return round(width * 96), round(height * 96)


def curve(
    axes: Axes, series: Series | None, number: int = 0, *, label: str = "", marked: bool = True, **style: Any
) -> None:
    """Draw a series, if there is one, in the colour, dashes and marker of this number."""
    if series is None:
        return
    series = series.thinned()
    number %= len(COLOURS)
    settings: dict[str, Any] = {"color": COLOURS[number], "linestyle": DASHES[number]}
    if marked or len(series.steps) == 1:  # a single point has no line
        settings |= {"marker": MARKERS[number], "markevery": max(1, len(series.steps) // 12)}
    axes.plot(series.steps, series.values, label=label, **(settings | style))


def sentence(parts: list[str]) -> str:
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]

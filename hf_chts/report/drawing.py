"""What figures have in common: their look, the words that go with them, and how they get into a page."""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_chts.report.series import Series

# Told apart with any colour vision, each 4.5:1 or more on white; dashes and markers tell them apart in grey
COLOURS = ("#0060a0", "#b34700", "#00704f", "#8a3a78", "#4d4d4d", "#6b5500")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1.2)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (8, 3)),
    (0, (3, 1, 1, 1, 1, 1)),
)
MARKERS = ("o", "s", "^", "D", "v", "P")

WIDTH = 5.0  # inches: on a phone of 390 pixels letters of 11.5 points are still 11 pixels high
_LOOK: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 11.5,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 11.5,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "text.parse_math": False,  # a $ in the name of a run is a $
    "svg.hashsalt": "hf_chts",  # else ids, and so files, differ from time to time
}


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

    def data_url(self) -> str:
        """The figure as the `src` of an image."""
        media_type = "image/svg+xml" if self.kind == "svg" else "image/png"
        return f"data:{media_type};base64,{base64.b64encode(self.encoded(self.kind)).decode()}"

    def encoded(self, kind: str) -> bytes:
        """The figure as a file of this kind."""
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        with look():
            engine = self.figure.get_layout_engine()
            if engine is not None:  # once for all files: it takes longer than to draw
                engine.execute(self.figure)
                self.figure.set_layout_engine("none")
            self.figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
        return buffer.getvalue()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in CSS pixels, so that the page does not jump while it is laid out."""
        width, height = self.figure.get_size_inches()
        return round(width * 96), round(height * 96)


@contextmanager
def look() -> Iterator[None]:
    """Within it figures are made and written in the report's look, whatever the user's matplotlibrc says."""
    with matplotlib.style.context("default"), matplotlib.rc_context(_LOOK):
        yield


def stacked(panels: int, panel_height: float = 2.1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of panels above each other that share the steps on their x axis."""
    figure = Figure(figsize=(WIDTH, panel_height * panels + 0.45), layout="constrained")
    axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False, **options)[:, 0])
    axes[-1].set_xlabel("optimizer step")
    axes[-1].xaxis.set_major_locator(step_ticks(6))
    return figure, axes


def step_ticks(most: int) -> MaxNLocator:
    """Ticks at round numbers of steps, `most` of them at most."""
    return MaxNLocator(most, integer=True, steps=[1, 2, 5, 10])


def as_shares(axes: Axes) -> None:
    """The y axis of what lies between 0 and 1: it goes no further, and has no offset."""
    low, high = axes.get_ylim()
    margin = 0.02 * (high - low)  # so that what is exactly 0 or 1 can be seen
    axes.set_ylim(max(low, -margin), min(high, 1 + margin))
    axes.ticklabel_format(axis="y", useOffset=False)


def curve(
    axes: Axes, series: Series | None, number: int = 0, *, label: str = "", marked: bool = True, **style: Any
) -> None:
    """Draw a series in the colour, dashes and marker of this number; nothing where there is none."""
    if series is None:
        return
    series = series.thinned()
    number %= len(COLOURS)
    settings: dict[str, Any] = {"color": COLOURS[number], "linestyle": DASHES[number]}
    if marked:
        settings |= {"marker": MARKERS[number], "markevery": max(1, len(series.steps) // 12)}
    axes.plot(series.steps, series.values, label=label, **(settings | style))


def legend_above(axes: Axes, columns: int = 2) -> None:
    """A legend above the panel, where no curve can run through it."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, borderaxespad=0.2, columnspacing=1.4)

"""What all figures share: colours, look, panels, and how they become files.

Figures are `matplotlib.figure.Figure` objects without pyplot, so that a user's choice of backend stays as it is.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Distinct with any colour vision, each with a contrast of 4.5:1 or more on white; dashes and markers help in grey
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
    "text.parse_math": False,  # a $ in a name is a $
    "svg.hashsalt": "hf_chts",  # fixed ids, so that the same figure is the same file
}


@contextmanager
def look() -> Iterator[None]:
    """Figures made within this context have our look, whatever the user's matplotlibrc says."""
    with matplotlib.style.context("default"), matplotlib.rc_context(_LOOK):
        yield


def encoded(figure: Figure, kind: str, dpi: int = 160) -> bytes:
    """The figure as the contents of a file of this kind, "svg" or "png". Call it under `look()`."""
    buffer = io.BytesIO()
    engine = figure.get_layout_engine()
    if engine is not None:  # once for all files: laying out takes longer than drawing
        engine.execute(figure)
        figure.set_layout_engine("none")
    figure.savefig(buffer, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def step_panels(panels: int, panel_height: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels above each other that share the optimizer steps on their x axis; heights in inches."""
    figure = Figure(figsize=(WIDTH, panel_height * panels + 0.45), layout="constrained")
    axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    axes[-1].set_xlabel("optimizer step")
    axes[-1].xaxis.set_major_locator(step_ticks(6))
    return figure, axes


def step_ticks(most: int) -> MaxNLocator:
    """Ticks at round numbers of steps, at most `most` of them."""
    return MaxNLocator(most, integer=True, steps=[1, 2, 5, 10])


def as_shares(axes: Axes) -> None:
    """Limit the y axis to shares, from 0 to 1, and write its ticks without an offset."""
    low, high = axes.get_ylim()
    margin = 0.02 * (high - low)  # so that a curve at exactly 0 or 1 is visible
    axes.set_ylim(max(low, -margin), min(high, 1 + margin))
    axes.ticklabel_format(axis="y", useOffset=False)


def legend_above(axes: Axes, columns: int = 2) -> None:
    """A legend above the panel, where no curve can run through it; none where no curve has a label."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, borderaxespad=0.2, columnspacing=1.4)

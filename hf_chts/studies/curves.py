"""The figure of a study: its curves over the run, a column of panels for each group of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_chts.plotting import COLOURS, DASHES, MARKERS, as_shares, encoded, look
from hf_chts.studies.page_results import StudyResults
from hf_chts.studies.study import Row

CAPTION = (
    "Means over the seeds, with a band from the lowest seed to the highest; the range of the first panels is that of "
    "the last four fifths of the runs. The row that others are compared with is black in every column."
)
_REFERENCE: Mapping[str, Any] = {"color": "black", "linestyle": (0, (4, 2)), "linewidth": 1.4}
_EARLY = 0.2  # of a run: its curve is out of the range of the first panels


@dataclass(frozen=True)
class Course:
    """A curve over seeds: what it runs over, and mean, least and most at each point."""

    axis: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def course(found: StudyResults, row: str, name: str) -> Course | None:
    """A row's curve of this name, at the points at which all its finished seeds have a finite value.

    Returns:
        The curve; None if no seed has it, or no point is common to all seeds.
    """
    points: list[dict[float, float]] = []
    for result in found.by_row[row].values():
        curves = result["curves"]
        axis = next(iter(curves), None)
        if axis is None or name not in curves:
            continue
        pairs = zip(curves[axis], curves[name], strict=True)
        points.append({at: value for at, value in pairs if at is not None and value is not None})
    shared = sorted(set.intersection(*(set(of) for of in points))) if points else []
    if not shared:
        return None
    values = np.array([[of[at] for at in shared] for of in points])
    return Course(
        tuple(shared),
        tuple(values.mean(axis=0).tolist()),
        tuple(values.min(axis=0).tolist()),
        tuple(values.max(axis=0).tolist()),
    )


def drawn(found: StudyResults, titles: Mapping[str, str]) -> dict[str, dict[str, Course]]:
    """The curves that there are: by name, those of `titles` alone, and then by row."""
    curves = {
        name: {row.name: one for row in found.study.rows if (one := course(found, row.name, name)) is not None}
        for name in titles
    }
    return {name: rows for name, rows in curves.items() if rows}


def columns(found: StudyResults) -> list[tuple[str, list[Row]]]:
    """Title and rows of each column: a group, or a part of it if it has more rows than there are colours.

    The study's first reference is in none of them: it is drawn in all.
    """
    first = found.study.references[:1]
    made = []
    for group, rows in found.groups().items():
        others = [row for row in rows if row.name not in first and found.by_row[row.name]]
        made += [(group, others[start : start + len(COLOURS)]) for start in range(0, len(others), len(COLOURS))]
    return made or [("", [])]


def encoded_figure(found: StudyResults, titles: Mapping[str, str]) -> bytes | None:
    """The figure as the contents of a PNG; None if no run has any of these curves.

    Args:
        titles: names of curves, the main one first, with the titles of their axes.
    """
    curves = drawn(found, titles)
    if not curves:
        return None
    with look():
        return encoded(_figure(found, curves, titles), "png", dpi=110)


def in_words(found: StudyResults, titles: Mapping[str, str]) -> str:
    """For those who do not see the figure: where each row's main curve ends."""
    curves = drawn(found, titles)
    name = next(iter(curves))
    rows = curves[name]
    ends = [f"{row.label} {rows[row.name].mean[-1]:.4g}" for row in found.study.rows if row.name in rows]
    return f"Curves of {', '.join(titles[name] for name in curves)}. {titles[name]} ends at: {'; '.join(ends)}."


def _figure(found: StudyResults, curves: Mapping[str, Mapping[str, Course]], titles: Mapping[str, str]) -> Figure:
    parts = columns(found)
    reference = next((row for row in found.study.rows if row.name in found.study.references[:1]), None)
    labels = {row.name: row.label for row in found.study.rows}
    legend = 0.21 * (max(len(rows) for _, rows in parts) + 1)  # inches, below the panels
    figure = Figure(figsize=(3.7 * len(parts) + 0.6, 2.3 * len(curves) + 0.6 + legend), layout="constrained")
    panels = figure.subplots(len(curves), len(parts), sharex=True, sharey="row", squeeze=False)
    for column, (group, own) in zip(panels.T, parts, strict=True):
        handles = {}
        for axes, rows in zip(column, curves.values(), strict=True):
            for number, row in enumerate(own):
                if row.name in rows:
                    handles[row.name] = _draw(axes, rows[row.name], number)
            if reference is not None and reference.name in rows:
                one = rows[reference.name]
                (handles[reference.name],) = axes.plot(one.axis, one.mean, **_REFERENCE)
        column[0].set_title(group)
        column[-1].set_xlabel(_axis_name(found))
        column[-1].legend(
            handles.values(),
            [labels[name] for name in handles],
            loc="upper left",
            bbox_to_anchor=(-0.02, -0.24),
            borderaxespad=0,
            labelspacing=0.2,
        )
    for line, (name, rows) in zip(panels, curves.items(), strict=True):
        line[0].set_ylabel(titles[name])
        if name == next(iter(titles)):
            _narrow(line[0], list(rows.values()))
        elif all(0 <= value <= 1 for one in rows.values() for value in one.high):
            as_shares(line[0])
    return figure


def _draw(axes: Axes, one: Course, number: int) -> Any:
    axes.fill_between(one.axis, one.low, one.high, color=COLOURS[number], alpha=0.18, linewidth=0)
    every = (number % 3, max(1, len(one.axis) // 6))  # markers of neighbours do not hide each other
    if len(one.axis) <= every[0]:
        every = (0, 1)
    (line,) = axes.plot(
        one.axis, one.mean, color=COLOURS[number], linestyle=DASHES[number], marker=MARKERS[number], markevery=every
    )
    return line


def _narrow(axes: Axes, rows: Sequence[Course]) -> None:
    """Limit the y axis to what the curves do after their beginning, which would press the rest together."""
    first = _EARLY * max(one.axis[-1] for one in rows)
    late = [
        value
        for one in rows
        for at, *values in zip(one.axis, one.low, one.high, strict=True)
        if at >= first
        for value in values
    ]
    if late and min(late) < max(late):
        margin = 0.05 * (max(late) - min(late))
        axes.set_ylim(min(late) - margin, max(late) + margin)


def _axis_name(found: StudyResults) -> str:
    return next(next(iter(result["curves"])) for result in found.results if result["curves"])

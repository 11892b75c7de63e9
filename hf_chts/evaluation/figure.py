"""A bar figure of the results of one or several models."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_chts.names import column_names
from hf_chts.plotting import COLOURS, encoded, look

# the metrics with a panel of their own; the harness's others are in the table
_PANELS = {
    "acc": "accuracy",
    "mcc": "Matthews correlation",
    "balanced_acc": "balanced accuracy",
    "bits_per_byte": "bits per byte (less is better)",
    "perplexity": "perplexity (less is better)",
    "word_perplexity": "perplexity per word (less is better)",
}


def results_figure(results: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Write the figure of `draw_results` as a PNG; returns `path`."""
    path = Path(path)
    with look():
        path.write_bytes(encoded(draw_results(results), "png", dpi=120))
    return path


@look()
def draw_results(results: Sequence[dict[str, Any]]) -> Figure:
    """Bars for each metric: a group for each task, in it a bar for each model, with standard errors.

    A black line across a group is the trivial score, of always giving the same answer or of guessing. Scores that are
    not finite have no bar.

    Args:
        results: what `evaluate_zero_shot` returned, one per model.
    """
    tasks = {
        metric: list(
            dict.fromkeys(task for result in results for task in result["tasks"] if metric in result["tasks"][task])
        )
        for metric in _PANELS
    }
    shown = [metric for metric in _PANELS if tasks[metric]]
    widest = max((len(tasks[metric]) for metric in shown), default=1)
    size = (max(6.0, 2.0 + 0.3 * widest * (len(results) + 1)), 2.8 * max(1, len(shown)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(max(1, len(shown)), 1, squeeze=False)
    names = column_names([result["model"] for result in results])
    for axes, metric in zip(panels[:, 0], shown, strict=False):
        _panel(axes, results, names, metric, tasks[metric])
        axes.set_xlim(-0.6, widest - 0.4)  # bars of the same width in all panels
    if shown:
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    else:
        panels[0, 0].text(0.5, 0.5, "no scores", ha="center", va="center", transform=panels[0, 0].transAxes)
    return figure


def _panel(axes: Axes, results: Sequence[dict[str, Any]], names: list[str], metric: str, tasks: list[str]) -> None:
    bar = 0.8 / len(results)
    for i, (result, name) in enumerate(zip(results, names, strict=True)):
        scores = [result["tasks"].get(task, {}) for task in tasks]
        places = [place - 0.4 + (i + 0.5) * bar for place in range(len(tasks))]
        heights = [_number(score.get(metric)) for score in scores]
        errors = [_number(score.get(f"{metric}_stderr"), 0.0) for score in scores]
        again, colour = divmod(i, len(COLOURS))
        style: dict[str, Any] = {"color": COLOURS[colour], "hatch": "/" * 3 * again, "edgecolor": "white", "lw": 0}
        axes.bar(places, heights, bar, yerr=errors, capsize=2, error_kw={"lw": 0.8}, label=name, **style)
    trivial = [
        next(
            (level for result in results if (level := result.get("trivial", {}).get(task, {}).get(metric)) is not None),
            None,
        )
        for task in tasks
    ]
    lines = [(place, level) for place, level in enumerate(trivial) if level is not None]
    if lines:
        axes.hlines(
            [level for _, level in lines],
            [place - 0.45 for place, _ in lines],
            [place + 0.45 for place, _ in lines],
            colors="black",
            label="trivial",
        )
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axes.set_ylabel(_PANELS[metric].replace(" (", "\n("))
    axes.axhline(0, color="black", lw=0.5)
    axes.grid(False, axis="x")


def _number(value: float | None, otherwise: float = math.nan) -> float:
    return value if value is not None and math.isfinite(value) else otherwise

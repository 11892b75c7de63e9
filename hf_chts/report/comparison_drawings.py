"""Figures of several runs on the same axes."""

from collections.abc import Iterator, Sequence

from hf_chts.report.drawing import Drawing, as_shares, curve, legend_above, look, stacked
from hf_chts.report.run import Run
from hf_chts.report.series import Series

_CURVES = {
    "compared_loss": {"loss": ("training loss", ".2f"), "eval_loss": ("validation loss", ".2f")},
    "compared_bits_per_byte": {"eval_bits_per_byte": ("bits per byte", ".3f")},
    "compared_topology": {
        "sparsity": ("sparsity", ".2f"),
        "itop": ("ITOP", ".3f"),
        "overlap": ("overlap", ".3f"),
        "active_neurons": ("active neurons", ".3f"),
        "topology_seconds": ("seconds", ".2f"),
    },
}
_SHARES = ("sparsity", "itop", "overlap", "active_neurons")
_WORDS = {
    "compared_loss": (
        "Loss of all runs",
        "In nats per token, by optimizer step; lower is better. Losses compare only between runs with one tokenizer.",
    ),
    "compared_bits_per_byte": (
        "Bits per byte of all runs",
        "On validation data; lower is better. Bits per byte do not depend on the tokenizer.",
    ),
    "compared_topology": (
        "Topology of all sparse runs",
        "All sparse layers together, after each update, and the seconds that it took. Dense and static runs have no "
        "updates and are not in it.",
    ),
}


def comparison_drawings(runs: Sequence[Run]) -> Iterator[Drawing]:
    """The figures that any of the runs has anything to show in; a run has one colour in all."""
    for name in _CURVES:
        with look():
            drawing = _drawing(name, runs)
        if drawing is not None:
            yield drawing


def _drawing(name: str, runs: Sequence[Run]) -> Drawing | None:
    found: dict[str, list[Series | None]] = {}
    for key in _CURVES[name]:
        curves = [Series.of(run.updates() if name == "compared_topology" else run.log, key) for run in runs]
        if any(curves):
            found[key] = curves
    if not found:
        return None
    figure, axes = stacked(len(found), 2.4 if len(found) < 3 else 1.7)
    told = []
    for panel, (key, rows) in zip(axes, found.items(), strict=True):
        title, form = _CURVES[name][key]
        panel.set_ylabel(title)
        for number, (run, series) in enumerate(zip(runs, rows, strict=True)):
            curve(panel, series, number, label=_short(run.label))
            if series:
                told.append(series.told(f"{run.label}: {title}", form))
        if key in _SHARES:
            as_shares(panel)
    first = next(panel for panel in axes if panel.get_legend_handles_labels()[1])
    legend_above(first, columns=3 if all(len(run.label) < 16 for run in runs) else 1)
    title, caption = _WORDS[name]
    return Drawing(name, title, caption, "; ".join(told) + ".", figure)


def _short(label: str, longest: int = 44) -> str:
    label = label if len(label) <= longest else "…" + label[1 - longest :]
    return f" {label}" if label.startswith("_") else label  # matplotlib leaves those out of legends

"""Figures of several runs on the same axes."""

from collections.abc import Mapping, Sequence
from functools import partial

from hf_chts.plotting import as_shares, legend_above, step_panels
from hf_chts.report.drawing import Drawing, Series, curve
from hf_chts.report.run import Run

_SHARES = ("sparsity", "itop", "overlap", "active_neurons")


def _drawing(
    name: str, title: str, caption: str, curves: Mapping[str, tuple[str, str]], runs: Sequence[Run]
) -> Drawing | None:
    """A panel for each key of `curves`, {key: (y axis, format)}, in which any run has values."""
    found: dict[str, list[Series | None]] = {}
    for key in curves:
        rows = [Series.of(run.updates() if name == "compared_topology" else run.log, key) for run in runs]
        if any(rows):
            found[key] = rows
    if not found:
        return None
    figure, axes = step_panels(len(found), 2.4 if len(found) < 3 else 1.7)
    words = []
    for panel, (key, rows) in zip(axes, found.items(), strict=True):
        label, form = curves[key]
        panel.set_ylabel(label)
        for number, (run, series) in enumerate(zip(runs, rows, strict=True)):
            curve(panel, series, number, label=_short(run.label))
            if series:
                words.append(series.in_words(f"{run.label}: {label}", form))
        if key in _SHARES:
            as_shares(panel)
    first = next(panel for panel in axes if panel.get_legend_handles_labels()[1])
    legend_above(first, columns=3 if all(len(run.label) < 16 for run in runs) else 1)
    return Drawing(name, title, caption, "; ".join(words) + ".", figure)


def _short(label: str, longest: int = 44) -> str:
    label = label if len(label) <= longest else "…" + label[1 - longest :]
    return f" {label}" if label.startswith("_") else label  # matplotlib leaves those out of legends


compared_loss = partial(
    _drawing,
    "compared_loss",
    "Loss of all runs",
    "In nats per token, by optimizer step; lower is better. Losses compare only between runs with one tokenizer.",
    {"loss": ("training loss", ".2f"), "eval_loss": ("validation loss", ".2f")},
)
compared_bits_per_byte = partial(
    _drawing,
    "compared_bits_per_byte",
    "Bits per byte of all runs",
    "On validation data; lower is better. Bits per byte do not depend on the tokenizer.",
    {"eval_bits_per_byte": ("bits per byte", ".3f")},
)
compared_topology = partial(
    _drawing,
    "compared_topology",
    "Topology of all sparse runs",
    "All sparse layers together, after each update, and the seconds that it took. Dense and static runs have no "
    "updates and are not shown.",
    {
        "sparsity": ("sparsity", ".2f"),
        "itop": ("ITOP", ".3f"),
        "overlap": ("overlap", ".3f"),
        "active_neurons": ("active neurons", ".3f"),
        "topology_seconds": ("seconds", ".2f"),
    },
)

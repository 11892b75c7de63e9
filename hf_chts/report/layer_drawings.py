"""Figures of single layers over time, with a panel for each kind of layer."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from statistics import fmean

from matplotlib.figure import Figure

from hf_chts.evolution.update_figures import LayerUpdate
from hf_chts.names import layer_kind, shortest_endings
from hf_chts.plotting import COLOURS, WIDTH, as_shares, step_ticks
from hf_chts.report.drawing import Drawing
from hf_chts.report.run import Run

# A share between 0 and 1 of a layer of shape (out, in) at an update; None where it is not defined or not recorded
Rate = Callable[[LayerUpdate, tuple[int, int]], float | None]


def kinds_of(names: Sequence[str]) -> dict[str, list[str]]:
    """The names of layers at all depths by their kind, which is called as shortly as possible."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(layer_kind(name), []).append(name)
    return dict(zip(shortest_endings(list(kinds), "."), kinds.values(), strict=True))


def _drawing(name: str, title: str, caption: str, rate: Rate, run: Run) -> Drawing | None:
    if run.records is None:
        return None
    rates: dict[str, dict[int, float]] = {layer: {} for layer in run.records.shapes}
    for step, layers in run.records.updates.items():
        for layer, update in layers.items():
            value = rate(update, run.records.shapes[layer])
            if value is not None:
                rates[layer][step] = value
    if not any(rates.values()):
        return None
    kinds = kinds_of(run.shown)
    columns = min(2, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(WIDTH, 1.55 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    words, deep = [], False
    for panel, (kind, members) in zip(panels, kinds.items(), strict=False):
        steps = sorted({step for member in members for step in rates[member]})
        values = [[rates[member][step] for member in members if step in rates[member]] for step in steps]
        means = [fmean(row) for row in values]
        panel.set_title(kind)
        panel.plot(steps, means, color=COLOURS[0], marker="o" if len(steps) == 1 else None)
        if len(members) > 1:
            deep = True
            lowest, highest = [min(row) for row in values], [max(row) for row in values]
            panel.fill_between(steps, lowest, highest, color=COLOURS[0], alpha=0.25, linewidth=0)
        if values:
            words.append(f"{kind} {means[-1]:.3f} ({min(values[-1]):.3f} to {max(values[-1]):.3f})")
        panel.xaxis.set_major_locator(step_ticks(4))
    as_shares(panels[0])
    for panel in panels[len(kinds) :]:
        panel.remove()
    for panel in panels[max(0, len(kinds) - columns) : len(kinds)]:
        panel.tick_params(labelbottom=True)
    figure.supxlabel("optimizer step", fontsize="medium")
    return Drawing(
        name,
        title,
        caption + (" The line is the mean over depth, the band from the lowest layer to the highest." if deep else ""),
        f"At the last update, the mean over depth (and the lowest to the highest layer): {'; '.join(words)}.",
        figure,
    )


layer_overlap = partial(
    _drawing,
    "layer_overlap",
    "Overlap by layer",
    "The share of a layer's regrown links that had just been removed. Near 1, its updates undo themselves.",
    lambda layer, shape: layer.returned / layer.regrown if layer.regrown and layer.returned is not None else None,
)
layer_itop = partial(
    _drawing,
    "layer_itop",
    "ITOP by layer",
    "The share of a layer's possible links that were active at least once.",
    lambda layer, shape: None if layer.explored is None else layer.explored / prod(shape),
)
layer_active_neurons = partial(
    _drawing,
    "layer_active_neurons",
    "Active neurons by layer",
    "The share of a layer's input and output nodes that have a link. Where it falls, the layer loses capacity.",
    lambda layer, shape: None if layer.active is None else layer.active / sum(shape),
)

"""Figures of single layers over time, a panel for each kind of layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from statistics import fmean

from matplotlib.figure import Figure

from hf_chts.evolution.update_figures import LayerUpdate
from hf_chts.records.snapshots import layer_kind
from hf_chts.report.drawing import COLOURS, WIDTH, Drawing, as_shares, look, step_ticks
from hf_chts.report.run import LayerRecords, Run

# A share between 0 and 1 of a layer of (out, in) at an update; None where it has none
Rate = Callable[[LayerUpdate, tuple[int, int]], float | None]


def layer_drawings(run: Run) -> Iterator[Drawing]:
    """The figures that the run has anything to show in."""
    if run.records is None or not run.records.updates:
        return
    kinds = kinds_of(run.shown)
    for name, (title, caption, rate) in _RATES.items():
        rates = layer_rates(run.records, rate)
        if not any(rates.values()):
            continue
        with look():
            yield _drawing(name, title, caption, rates, kinds)


def layer_rates(records: LayerRecords, rate: Rate) -> dict[str, dict[int, float]]:
    """A rate of each layer by step, by name; without the updates that it is not defined at."""
    rates: dict[str, dict[int, float]] = {name: {} for name in records.shapes}
    for step, layers in records.updates.items():
        for name, layer in layers.items():
            value = rate(layer, records.shapes[name])
            if value is not None:
                rates[name][step] = value
    return rates


def overlap(layer: LayerUpdate, shape: tuple[int, int]) -> float | None:
    return layer.returned / layer.regrown if layer.regrown and layer.returned is not None else None


def itop(layer: LayerUpdate, shape: tuple[int, int]) -> float | None:
    return None if layer.explored is None else layer.explored / prod(shape)


def active_neurons(layer: LayerUpdate, shape: tuple[int, int]) -> float | None:
    return None if layer.active is None else layer.active / sum(shape)


_RATES: dict[str, tuple[str, str, Rate]] = {
    "layer_overlap": (
        "Overlap by layer",
        "The share of a layer's regrown links that had just been removed. Near 1, its updates undo themselves.",
        overlap,
    ),
    "layer_itop": ("ITOP by layer", "The share of a layer's possible links that were active at least once.", itop),
    "layer_active_neurons": (
        "Active neurons by layer",
        "The share of a layer's input and output nodes that have a link. What falls here is capacity that is lost.",
        active_neurons,
    ),
}


def kinds_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Names of layers by kind, at all depths; kinds are called as shortly as tells them apart."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(layer_kind(name), []).append(name)
    return {short_name(kind, list(kinds)): members for kind, members in kinds.items()}


def short_name(name: str, others: Sequence[str]) -> str:
    """As many of the last parts of a dotted name as no other one ends with."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        if sum(other.split(".")[-count:] == parts[-count:] for other in others) == 1:
            return ".".join(parts[-count:])
    return name


def _drawing(
    name: str, title: str, caption: str, rates: Mapping[str, Mapping[int, float]], kinds: Mapping[str, Sequence[str]]
) -> Drawing:
    columns = min(2, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(WIDTH, 1.55 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    told, deep = [], False
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
            told.append(f"{kind} {means[-1]:.3f} ({min(values[-1]):.3f} to {max(values[-1]):.3f})")
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
        f"At the last update, the mean over depth (and the lowest to the highest layer): {'; '.join(told)}.",
        figure,
    )

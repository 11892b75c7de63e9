"""Figures of how the topology of a whole model changed."""

from hf_chts.plotting import as_shares, legend_above, step_panels
from hf_chts.report.drawing import Drawing, Series, curve
from hf_chts.report.run import Run

_EXPLORATION = {
    "itop": ("ITOP", "ITOP, the share of links ever active,"),
    "overlap": ("overlap", "overlap"),
    "active_neurons": ("active neurons", "the share of active neurons"),
}


def exploration(run: Run) -> Drawing | None:
    updates = run.updates()
    series = {key: found for key in _EXPLORATION if (found := Series.of(updates, key))}
    if not series:
        return None
    figure, axes = step_panels(len(series), 1.7)
    for number, (panel, (key, found)) in enumerate(zip(axes, series.items(), strict=True)):
        curve(panel, found, number)
        panel.set_ylabel(_EXPLORATION[key][0])
        as_shares(panel)
    words = [found.in_words(_EXPLORATION[key][1], ".3f") for key, found in series.items()]
    return Drawing(
        "exploration",
        "Exploration",
        "All sparse layers together. ITOP: the share of possible links that were active at least once. Overlap: the "
        "share of the regrown links that had just been removed; near 1, updates undo themselves. Active neurons: the "
        "share of input and output nodes that have a link.",
        "; ".join(words) + ".",
        figure,
    )


def links(run: Run) -> Drawing | None:
    updates = run.updates()
    removed, regrown = (Series.of(updates, key) for key in ("links_removed", "links_regrown"))
    if removed is None or regrown is None:
        return None
    figure, axes = step_panels(1, 2.5)
    curve(axes[0], removed, 0, label="removed")
    curve(axes[0], regrown, 1, label="regrown")
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("links an update")
    axes[0].yaxis.set_major_formatter(lambda value, _: _count(value))
    legend_above(axes[0])
    return Drawing(
        "links",
        "Links removed and regrown",
        "Links that each update removed, pruned ones included, and that it regrew. Where it removes more than it "
        "regrows, the model becomes sparser.",
        f"{sum(removed.values):,.0f} links are removed in all and {sum(regrown.values):,.0f} regrown; "
        f"{removed.in_words('an update’s removed links', ',.0f')}; {regrown.in_words('its regrown links', ',.0f')}.",
        figure,
    )


def _count(value: float) -> str:
    """1,200,000 as 1.2M, since ticks have little room."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"

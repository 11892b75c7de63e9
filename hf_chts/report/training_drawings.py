"""Figures of a run over its steps: how it trained, and how the topology of the whole model changed."""

from matplotlib.ticker import PercentFormatter

from hf_chts.plotting import COLOURS, as_shares, legend_above, step_panels
from hf_chts.report.drawing import Drawing, Series, curve, sentence
from hf_chts.report.run import Run

_EXPLORATION = {
    "itop": ("ITOP", "ITOP, the share of links ever active,"),
    "overlap": ("overlap", "overlap"),
    "active_neurons": ("active neurons", "the share of active neurons"),
}


def loss(run: Run) -> Drawing | None:
    training, validation = (Series.of(run.log, key) for key in ("loss", "eval_loss"))
    bits = Series.of(run.log, "eval_bits_per_byte")
    if training is None and validation is None:
        return None
    figure, axes = step_panels(2 if bits else 1, 2.4)
    curve(axes[0], training, 0, label="training", marked=False)
    curve(axes[0], validation, 1, label="validation")
    axes[0].set_ylabel("nats per token")
    legend_above(axes[0])
    if bits:
        curve(axes[1], bits, 2)
        axes[1].set_ylabel("bits per byte")
    words = [
        series.in_words(name)
        for series, name in ((training, "training loss"), (validation, "validation loss"), (bits, "bits per byte"))
        if series
    ]
    return Drawing(
        "loss",
        "Loss and bits per byte" if bits else "Loss",
        "Lower is better. The training loss is of single batches, or means over them, as the Trainer logged it; "
        "validation is on data that the run never trains on. "
        + ("Bits per byte do not depend on the tokenizer, so that they compare across models." if bits else ""),
        sentence(words),
        figure,
    )


def schedules(run: Run) -> Drawing | None:
    plan = run.plan()
    if run.is_dense or run.config is None or not run.config.evolves or plan is None:
        return None
    config, interval = run.config, plan.interval
    updates = range(interval, plan.last_update + 1, interval)
    held = [0, *updates, run.max_steps]
    sparsity = Series(tuple(held), tuple(plan.sparsity(min(step, plan.last_update)) for step in held))
    drop = Series(tuple(updates), tuple(plan.drop_fraction(step) for step in updates))
    soft = config.removal_choice == "soft"
    figure, axes = step_panels(3 if soft else 2, 1.9)
    curve(axes[0], sparsity, 0, label="planned", marked=False, drawstyle="steps-post")
    measured = Series.of(run.updates(), "sparsity")
    curve(axes[0], measured, 1, label="measured", linestyle="none")
    axes[0].set_ylabel("sparsity")
    as_shares(axes[0])
    legend_above(axes[0])
    curve(axes[1], drop, 2)
    axes[1].set_ylabel("drop fraction ζ")
    axes[1].set_ylim(bottom=0)
    words = [(measured or sparsity).in_words("sparsity", ".1%"), drop.in_words("the drop fraction", ".3f")]
    if soft:
        softness = Series.of(run.updates(), "softness") if config.adapts_softness else None
        if softness is None:
            values = (plan.temperature(step) for step in updates)
            softness = Series(tuple(updates), tuple(value / (1 + value) for value in values))
        curve(axes[2], softness, 3)
        if config.adapts_softness and run.records and run.records.softness:
            rows = run.records.softness
            low, high = ([extreme(row.values()) for row in rows.values()] for extreme in (min, max))
            axes[2].fill_between(list(rows), low, high, alpha=0.2, color=COLOURS[3], linewidth=0)
        axes[2].set_ylabel("softness δ")
        axes[2].set_ylim(0, 1)
        words.append(softness.in_words("softness"))
    return Drawing(
        "schedules",
        "Schedules",
        "Sparsity is the share of missing links, over all sparse layers. ζ is the share of its links that a layer "
        "replaces at an update."
        + (" δ says how removal chooses: 0 draws at random, 1 keeps the strongest links." if soft else "")
        + (" The band is from the lowest layer to the highest." if config.adapts_softness else ""),
        sentence(words),
        figure,
    )


def seconds(run: Run) -> Drawing | None:
    topology = Series.of(run.updates(), "topology_seconds")
    if topology is None:
        return None
    lines = [line for line in run.seconds if line.get("topology_seconds") and line.get("seconds")]
    share = Series.of(
        [{"step": one["step"], "share": one["topology_seconds"] / one["seconds"]} for one in lines], "share"
    )
    figure, axes = step_panels(2 if share else 1, 1.9)
    curve(axes[0], topology, 0)
    axes[0].set_ylabel("seconds an update")
    axes[0].set_ylim(bottom=0)
    words = [
        f"the {len(topology.steps)} updates take {sum(topology.values):.1f} seconds together, "
        f"the longest {max(topology.values):.2f}"
    ]
    if share:
        curve(axes[1], share, 1)
        axes[1].set_ylabel("share of the time")
        axes[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if max(share.values) > 0.05 else 1))
        axes[1].set_ylim(bottom=0)
        words.append(share.in_words("their share of the time since the update before", ".1%"))
    return Drawing(
        "seconds",
        "Seconds spent on the topology",
        "Wall-clock seconds of each update"
        + (
            ", and their share of the time from one update to the next, with evaluation and checkpoints in it."
            if share
            else "."
        ),
        sentence(words),
        figure,
    )


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

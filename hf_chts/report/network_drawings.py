"""Figures of a few layers as networks at a few steps: their adjacency matrices and their degrees."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from hf_chts.plotting import COLOURS, DASHES, WIDTH
from hf_chts.records.snapshots import LayerSnapshot
from hf_chts.report.drawing import Drawing
from hf_chts.report.run import Run

BINS = 40

Snapshots = Mapping[int, Mapping[str, LayerSnapshot]]


def _known(run: Run, *kinds: str) -> tuple[Snapshots, list[str]]:
    """(by step, the layers of which all these kinds were recorded; the names of those of them to show)"""
    known = {
        step: {name: one for name, one in snapshot.items() if all(getattr(one, kind) is not None for kind in kinds)}
        for step, snapshot in run.snapshots.items()
    }
    names = [name for name in run.shown if any(name in snapshot for snapshot in known.values())]
    return {step: snapshot for step, snapshot in known.items() if snapshot}, names


def adjacency(run: Run) -> Drawing | None:
    snapshots, names = _known(run, "picture")
    if not names:
        return None
    steps = list(snapshots)
    figure = Figure(figsize=(WIDTH, 2.05 * len(names) + 0.7), layout=ConstrainedLayoutEngine(h_pad=0.1))
    panels = figure.subplots(len(names), len(steps), squeeze=False)
    words = []
    pictures = {
        (step, name): one.picture.float().numpy()
        for step, snapshot in snapshots.items()
        for name, one in snapshot.items()
        if one.picture is not None and name in names
    }
    # a scale up to the very densest cells would only darken all others
    top = max(float(np.quantile(picture, 0.99)) for picture in pictures.values()) or 1.0
    norm = PowerNorm(0.5, vmin=0, vmax=top)  # by the square root: sparse networks would all look black
    image = None
    for row, name in zip(panels, names, strict=True):
        densities = []
        for panel, step in zip(row, steps, strict=True):
            panel.set_xticks([])
            panel.set_yticks([])
            panel.grid(False)
            picture = pictures.get((step, name))
            if picture is None:
                panel.set_axis_off()
                continue
            image = panel.imshow(picture, cmap="cividis", norm=norm, aspect="auto", interpolation="nearest")
            panel.spines[:].set_visible(False)
            panel.set_title(f"step {step}")
            densities.append(f"{_density(snapshots[step][name], picture):.1%} at step {step}")
        row[0].set_title(f"{_title(name)}\nstep {steps[0]}")
        row[0].set_ylabel("outputs")
        words.append(f"{name} has {', '.join(densities)} of its possible links")
    for panel in panels[-1]:
        panel.set_xlabel("inputs")
    if image is not None:
        bar = figure.colorbar(
            image, ax=panels, location="bottom", aspect=40, shrink=0.9, extend="max" if top < 1 else "neither"
        )
        bar.set_label("share of possible links that exist")
        bar.ax.grid(False)
    return Drawing(
        "adjacency",
        "Adjacency",
        "Rows are output nodes, columns input nodes, in their order in the model; a cell stands for one link, or a "
        "block of neighbours in layers of more than 256 nodes. A diagonal band is local connectivity, stripes are "
        "nodes with many links (bright) or few (dark).",
        "; ".join(words) + ".",
        figure,
        kind="png",
    )


def degrees(run: Run) -> Drawing | None:
    snapshots, names = _known(run, "out_degrees", "in_degrees")
    if not names:
        return None
    steps = list(snapshots)
    figure = Figure(figsize=(WIDTH, 1.75 * len(names) + 0.9), layout=ConstrainedLayoutEngine(h_pad=0.1))
    panels = figure.subplots(len(names), 2, squeeze=False)
    words = []
    for row, name in zip(panels, names, strict=True):
        for panel, side in zip(row, ("out", "in"), strict=True):
            found = {s: getattr(snapshots[s][name], f"{side}_degrees").numpy() for s in steps if name in snapshots[s]}
            everywhere = np.concatenate(list(found.values()))
            low, high = int(everywhere.min()), int(everywhere.max())
            width = max(1, -(-(high - low + 1) // BINS))
            edges = np.arange(low, high + width + 1, width) - 0.5
            for number, (step, nodes) in enumerate(found.items()):
                shares = np.histogram(nodes, edges)[0] / len(nodes)
                panel.stairs(
                    shares, edges, color=COLOURS[number], linestyle=DASHES[number], linewidth=1.6, label=f"step {step}"
                )
                if step == steps[-1]:
                    words.append(
                        f"{name}, {side}put nodes: {nodes.min()} to {nodes.max()} links, mean {nodes.mean():.1f}"
                    )
            panel.set_ylim(bottom=0)
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        row[0].set_title(_title(name), fontsize="medium")
        row[0].set_ylabel("nodes")
    for panel, side in zip(panels[-1], ("output", "input"), strict=True):
        panel.set_xlabel(f"links of an {side} node")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=len(steps), frameon=False)
    return Drawing(
        "degrees",
        "Degrees",
        "How many nodes have how many links: output nodes left, input nodes right. A narrow peak is a network whose "
        "nodes are alike; a long tail to the right means hubs, and nodes at 0 have no link at all.",
        f"At step {steps[-1]}: {'; '.join(words)}.",
        figure,
    )


def _title(name: str, longest: int = 46) -> str:
    return name if len(name) <= longest else f"{name[: longest // 2 - 1]}…{name[-longest // 2 :]}"


def _density(layer: LayerSnapshot, picture: npt.NDArray[np.float32]) -> float:
    if layer.out_degrees is None or layer.in_degrees is None:
        return float(picture.mean())  # the cells are of one size, to within one node a side
    return int(layer.out_degrees.sum()) / (len(layer.out_degrees) * len(layer.in_degrees))

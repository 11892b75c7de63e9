"""The figures of a topology update, by layer and in total."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_chts.topology.bits import count_bits_of_each
from hf_chts.topology.evolution import counts_of
from hf_chts.topology.percolation import active_neurons_of_each


@dataclass(frozen=True)
class LayerUpdate:
    """Counts of one layer at one update. They are integers, so that their sums are exact.

    None means unknown: the version that wrote the record did not count it.

    Attributes:
        links: links after the update.
        removed: links that were removed, pruned ones included.
        regrown: links that were added.
        returned: regrown links that the same update had removed; pruned links do not count.
        active: input and output nodes that have a link after the update.
        explored: links that were ever active.
    """

    links: int | None = None
    removed: int | None = None
    regrown: int | None = None
    returned: int | None = None
    active: int | None = None
    explored: int | None = None


def counts_after(masks: Tensor, explored: Tensor) -> Tensor:
    """What `LayerUpdate` counts of topologies: int64 (layers, 3), links, active and explored.

    Args:
        masks: bool (layers, out, in), after the update.
        explored: the links that were ever active, bit-packed uint8 (layers, bytes).
    """
    return torch.stack([counts_of(masks), active_neurons_of_each(masks), count_bits_of_each(explored)], 1)


def overall_figures(layers: Mapping[str, LayerUpdate], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The figures of all layers together, as the Trainer logs them; a figure whose counts are unknown is left out.

    Args:
        layers: by name.
        shapes: (out, in) by name, at least for these layers.
    """
    possible = sum(shapes[name][0] * shapes[name][1] for name in layers)
    counts = {count: [getattr(layer, count) for layer in layers.values()] for count in LayerUpdate.__dataclass_fields__}
    sums = {count: sum(found) for count, found in counts.items() if None not in found}
    figures: dict[str, Any] = {}
    if "links" in sums:
        figures["sparsity"] = 1 - sums["links"] / possible
    if "explored" in sums:
        figures["itop"] = sums["explored"] / possible
    if "returned" in sums and "regrown" in sums:
        figures["overlap"] = sums["returned"] / sums["regrown"] if sums["regrown"] else 0.0
    if "active" in sums:
        figures["active_neurons"] = sums["active"] / sum(sum(shapes[name]) for name in layers)
    return figures | {f"links_{count}": sums[count] for count in ("removed", "regrown") if count in sums}


def average_links(history: Iterable[Mapping[str, Any]], links: int, steps: int) -> float:
    """The number of links that a step of a run was taken with, on the mean.

    Args:
        history: the figures of each update (`links_removed`, `links_regrown`) and its `step`, in order.
        links: those after the last of them.
        steps: of the run.
    """
    total, end = 0, steps
    for update in reversed(list(history)):
        total += links * (end - update["step"])
        links += update["links_removed"] - update["links_regrown"]
        end = update["step"]
    return (total + links * end) / steps if steps else float(links)

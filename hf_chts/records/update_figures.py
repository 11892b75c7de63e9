"""What a topology update did, counted by layer and summed up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_chts.topology.bits import count_bits
from hf_chts.topology.metrics import active_neuron_rate


@dataclass(frozen=True)
class LayerUpdate:
    """Counts of one layer at one update; whole numbers, so that sums of them are exact. None: not known, as where the
    version of a record did not count it.

    Attributes:
        links: links after the update.
        removed: links that went, pruned ones included.
        regrown: links that came.
        returned: those of the regrown that had just been removed; pruned ones that came back are not among them.
        active: input and output nodes that have a link after the update.
        explored: links that were ever active.
    """

    links: int | None = None
    removed: int | None = None
    regrown: int | None = None
    returned: int | None = None
    active: int | None = None
    explored: int | None = None

    @classmethod
    def of(cls, mask: Tensor, explored: Tensor, done: Sequence[int]) -> "LayerUpdate":
        """Of a mask after the update, bool (out, in), the bits ever active, (pruned, removed, regrown, returned)."""
        pruned, removed, regrown, returned = done
        return cls(
            links=int(mask.count_nonzero()),
            removed=pruned + removed,
            regrown=regrown,
            returned=returned,
            active=round(active_neuron_rate(mask) * sum(mask.shape)),
            explored=count_bits(explored),
        )


def overall_figures(layers: Mapping[str, LayerUpdate], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The figures of all layers together, as the Trainer logs them; without those whose counts are not known.

    Shapes are (out, in) by layer name.
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

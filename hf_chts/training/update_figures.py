"""What a topology update did, counted by layer and summed up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_chts.topology.bits import count_bits
from hf_chts.topology.metrics import active_neuron_rate


@dataclass(frozen=True)
class LayerUpdate:
    """Counts of one layer at one update; whole numbers, so that sums of them are exact.

    Attributes:
        links: links after the update.
        removed: links that went, pruned ones included.
        regrown: links that came.
        returned: those of the regrown that had just been removed; pruned ones that came back are not among them.
        active: input and output nodes that have a link after the update.
        explored: links that were ever active.
    """

    links: int
    removed: int
    regrown: int
    returned: int
    active: int
    explored: int

    @classmethod
    def of(cls, mask: Tensor, explored: Tensor, done: Sequence[float]) -> "LayerUpdate":
        """Of a mask after the update, bool (out, in), the bits ever active, and (pruned, removed, regrown, overlap)."""
        pruned, removed, regrown, overlap = done
        return cls(
            links=int(mask.count_nonzero()),
            removed=int(pruned + removed),
            regrown=int(regrown),
            returned=round(overlap * regrown),
            active=round(active_neuron_rate(mask) * sum(mask.shape)),
            explored=count_bits(explored),
        )


def overall_figures(layers: Mapping[str, LayerUpdate], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The figures of all layers together, as the Trainer logs them; shapes are (out, in) by layer name."""
    possible = sum(shapes[name][0] * shapes[name][1] for name in layers)
    regrown = sum(layer.regrown for layer in layers.values())
    return {
        "sparsity": 1 - sum(layer.links for layer in layers.values()) / possible,
        "itop": sum(layer.explored for layer in layers.values()) / possible,
        "overlap": sum(layer.returned for layer in layers.values()) / regrown if regrown else 0.0,
        "active_neurons": sum(layer.active for layer in layers.values()) / sum(sum(shapes[name]) for name in layers),
        "links_removed": sum(layer.removed for layer in layers.values()),
        "links_regrown": regrown,
    }

"""The weights that links start with."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_chts.config import SparsityConfig
from hf_chts.layers.linked_layer import LinkedLayer
from hf_chts.layers.sparse_layer import SparseLayer
from hf_chts.sharding.partitions import held_part
from hf_chts.topology.random_streams import random_stream

# the standard deviation of the links' weights, by the number of links and the shape (out, in) of a layer
_DEVIATION: Mapping[str, Callable[[int, int, int], float]] = {
    "swi": lambda links, outs, ins: math.sqrt(2 * outs / max(links, 1)),
    "kaiming": lambda links, outs, ins: math.sqrt(2 / ins),
}


@torch.no_grad()
def initialize_links(layers: Mapping[str, SparseLayer], config: SparsityConfig) -> None:
    """Give the links of new sparse layers new weights, as `initial_weights` says; biases stay as they are.

    They are normal with mean 0 and, for "swi" (sparse weight initialization, of CHT's paper), standard deviation
    √(2 / mean fan-in of links), which keeps the variance of ReLU layers at any density; for "kaiming", √(2 / in), as a
    dense layer's. They depend on `topology_seed` alone, and are the same for any storage and number of ranks.
    """
    if config.initial_weights == "model":
        return
    deviation = _DEVIATION[config.initial_weights]
    for number, layer in enumerate(layers.values()):
        shape = layer.storage.shape
        topology = layer.topology.cpu()
        generator = random_stream(config.topology_seed, 0, number, "initial weights")
        links = int(torch.count_nonzero(topology))
        values = torch.randn(links, generator=generator) * deviation(links, *shape)
        _write(layer, torch.zeros(shape).masked_scatter_(topology, values))


def _write(layer: SparseLayer, matrix: Tensor) -> None:
    """Set the weight to `matrix`, (out, in), 0 off the links."""
    weight = layer.matrix(matrix)
    if isinstance(layer, LinkedLayer):
        layer.link_values.copy_(layer.slot_values(weight.to(layer.storage.device)))
        return
    part, start = held_part(layer.parameter)
    part.copy_(weight.reshape(-1)[start : start + part.numel()].view(part.shape))

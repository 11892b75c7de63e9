"""The topologies that training starts from. Each returns bool (out_features, in_features) with exactly
`links_at(out * in, sparsity)` links, and is the same for the same generator state."""

import torch
from torch import Tensor

from hf_chts.topology.allocation import layer_links
from hf_chts.topology.correlated import correlated
from hf_chts.topology.sampling import choose
from hf_chts.topology.scale_free import bipartite_scale_free
from hf_chts.topology.small_world import bipartite_small_world

__all__ = [
    "bipartite_receptive_field",
    "bipartite_scale_free",
    "bipartite_small_world",
    "correlated",
    "erdos_renyi",
]

# Rows of BRF drawn at a time: float64 keys for all rows of a large layer would be gigabytes
_BLOCK_ELEMENTS = 1 << 24


def erdos_renyi(out_features: int, in_features: int, sparsity: float, *, generator: torch.Generator) -> Tensor:
    """Every set of links equally likely, with the exact number of links."""
    links = layer_links(out_features, in_features, sparsity)
    every = torch.ones(out_features, in_features, dtype=torch.bool, device=generator.device)
    return choose(every.to(torch.float32), links, every, soft=True, generator=generator)


def bipartite_receptive_field(
    out_features: int,
    in_features: int,
    sparsity: float,
    *,
    r: float = 0.1,
    degree_distribution: str = "fixed",
    generator: torch.Generator,
) -> Tensor:
    """BRF: each output node prefers the inputs near its own place (arXiv 2501.19107, §3.2).

    Output i sits at i·in/out on the ring of inputs, and takes its inputs without replacement with probability in
    proportion to (1 + distance)^(−(1 − r)/r).

    Args:
        r: spread of the receptive field: 0 takes the nearest inputs, 1 is uniform over all of them.
        degree_distribution: "fixed" gives every output node the same degree (to within one link, where the total
            does not divide); "uniform" draws it uniformly around the mean, between 1 and 2·mean − 1 (less wide where
            that exceeds in_features), and keeps the total exact.

    Raises:
        ValueError: a size, `sparsity`, `r` or `degree_distribution` out of range.
    """
    total = layer_links(out_features, in_features, sparsity)
    if not 0 <= r <= 1:
        raise ValueError(f"r of the bipartite receptive field is {r}; it must lie in [0, 1]")
    device = generator.device
    if degree_distribution == "fixed":
        degrees = _fixed_degrees(out_features, total, generator)
    elif degree_distribution == "uniform":
        degrees = _uniform_degrees(out_features, in_features, total, generator)
    else:
        raise ValueError(f"degree_distribution is {degree_distribution!r}; choose 'fixed' or 'uniform'")

    mask = torch.zeros(out_features, in_features, dtype=torch.bool, device=device)
    inputs = torch.arange(in_features, dtype=torch.float64, device=device)
    rows = max(1, _BLOCK_ELEMENTS // in_features)
    for start in range(0, out_features, rows):
        block = slice(start, min(start + rows, out_features))
        centres = torch.arange(block.start, block.stop, dtype=torch.float64, device=device)
        away = (inputs - (centres * in_features / out_features)[:, None]).abs_()
        distance = torch.minimum(away, in_features - away)  # (rows, in)
        uniform = torch.rand(distance.shape, dtype=torch.float64, device=device, generator=generator)
        if r == 0:
            # nearest first; the random part only parts equals, since distances differ by 1/out at least
            keys = -distance - uniform / (4 * max(out_features, in_features))
        else:
            # Gumbel top-k: the order of successive sampling in proportion to exp(log weight)
            gumbel = -torch.log(-torch.log1p(-uniform))
            keys = gumbel - (1 - r) / r * torch.log1p(distance)
        degree = degrees[block]
        order = keys.argsort(dim=1, descending=True)[:, : int(degree.max())]
        wanted = torch.arange(order.shape[1], device=device) < degree[:, None]
        mask[block].scatter_(1, order, wanted)
    return mask


def _fixed_degrees(nodes: int, total: int, generator: torch.Generator) -> Tensor:
    degrees = torch.full((nodes,), total // nodes, dtype=torch.int64, device=generator.device)
    order = torch.randperm(nodes, generator=generator, device=generator.device)
    degrees[order[: total % nodes]] += 1
    return degrees


def _uniform_degrees(nodes: int, largest: int, total: int, generator: torch.Generator) -> Tensor:
    mean = total / nodes
    half_width = max(0.0, min(mean - 1, largest - mean))
    low, high = int(mean - half_width), int(mean + half_width)
    low, high = min(low + (low < mean - half_width), int(mean)), max(high, -int(-mean // 1))
    device = generator.device
    degrees = torch.randint(low, high + 1, (nodes,), generator=generator, device=device)
    # The sum of independent draws misses the total by a few per mille: single links are added or taken, one per node
    # and round, at random nodes that have room
    while error := total - int(degrees.sum()):
        room = (degrees < high if error > 0 else degrees > low).nonzero().squeeze(1)
        order = torch.randperm(room.numel(), generator=generator, device=device)
        degrees[room[order[: abs(error)]]] += 1 if error > 0 else -1
    return degrees

"""Bipartite small world (BSW): a ring lattice of which some links are rewired."""

import torch
from torch import Tensor

from hf_chts.topology.allocation import check_links
from hf_chts.topology.parts import register
from hf_chts.topology.sampling import choose

# Elements of rows to rewire at a time: float64 keys for all rows of a large layer would be gigabytes
_BLOCK_ELEMENTS = 1 << 24


@register.initial_topology("bipartite_small_world", options={"beta": "bsw_beta"})
def bipartite_small_world(
    out_features: int,
    in_features: int,
    links: int,
    *,
    beta: float = 0.25,
    generator: torch.Generator,
) -> Tensor:
    """BSW: nearest inputs on a ring, with a fraction β of the links rewired (arXiv 2501.19107, App. D).

    In the lattice, output i sits at i·in/out on the ring of inputs and takes the nearest ones, of two equally near the
    lower. Output degrees differ by at most one link, and the higher ones are spread evenly. Then round(β·links) links,
    drawn uniformly, are removed, and each output draws as many inputs as it lost, uniformly from all that it lacks,
    including those just lost.

    Args:
        beta: in [0, 1]; 0 is the lattice, 1 an Erdős-Rényi network with equal output degrees. The paper's best is 0.25.

    Returns:
        bool (out, in) with exactly `links` links, on the generator's device.

    Raises:
        ValueError: a size, `links` or `beta` is out of range.
    """
    total = check_links(out_features, in_features, links)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta of the bipartite small world is {beta}; it must lie in [0, 1]")
    mask = _ring_lattice(out_features, in_features, total, generator.device)
    rewired = choose(mask.to(torch.float32), round(beta * total), mask, soft=True, generator=generator)
    mask &= ~rewired
    rows = max(1, _BLOCK_ELEMENTS // in_features)
    for block, lost in zip(mask.split(rows), rewired.sum(1).split(rows), strict=True):
        most = int(lost.max())
        keys = torch.rand(block.shape, dtype=torch.float64, device=block.device, generator=generator)
        order = keys.masked_fill_(block, -1).topk(most, dim=1).indices  # (rows, most)
        wanted = torch.arange(most, device=block.device) < lost[:, None]
        # beyond a row's number `order` may point at links, which stay
        block.scatter_(1, order, wanted | block.gather(1, order))
    return mask


def _ring_lattice(outs: int, ins: int, total: int, device: torch.device) -> Tensor:
    i = torch.arange(outs, device=device)
    degrees = (i + 1) * total // outs - i * total // outs
    # the nearest k inputs to i·in/out start at ceil(i·in/out − k/2) and go around the ring; −(−a // b) rounds up
    first = -((degrees * outs - 2 * i * ins) // (2 * outs))
    most = int(degrees.max())
    steps = torch.arange(most, device=device)
    inputs = (first[:, None] + steps) % ins  # (out, most), distinct along a row
    mask = torch.zeros(outs, ins, dtype=torch.bool, device=device)
    return mask.scatter_(1, inputs, steps < degrees[:, None])

"""The only file that knows how an engine holds weights, moments and ranks.

Every engine answers the same few questions: whose turn is a layer, what is its whole weight, and where must zeros go
when its topology changes.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hf_chts.layers.masked_linear import MaskedLinear
from hf_chts.topology.bits import link_positions, pack_bits, unpack_bits


class ReplicatedWeights:
    """One process, or DDP: every rank holds every weight and every moment whole."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def weight(self, layer: MaskedLinear) -> Tensor:
        """The whole weight of a layer, (out, in), to read."""
        return layer.weight.detach()

    @torch.no_grad()
    def set_topology(self, layer: MaskedLinear, mask: Tensor, stored: Tensor | None = None) -> None:
        """Give the layer a new mask; weight, gradient and every moment of the links that go become 0.

        Links that come were 0 in all of them, by the invariant, and stay so; with `stored`, (out, in), they start with
        its weight, and the weights of the links that go are put there.
        """
        if stored is not None:
            come = link_positions(mask & ~layer.mask)
            revived = stored.view(-1)[come]
            torch.where(layer.mask, layer.weight, stored, out=stored)
        gone = link_positions(layer.mask & ~mask)
        weight = layer.weight
        state = self.optimizer.state.get(weight, {})
        for tensor in (weight, weight.grad, *state.values()):
            if isinstance(tensor, Tensor) and tensor.shape == weight.shape:
                if tensor.is_contiguous():
                    tensor.view(-1).index_fill_(0, gone, 0)
                else:
                    tensor.masked_fill_(~mask, 0)
        if stored is not None:
            weight.view(-1).index_copy_(0, come, revived)
        layer.mask.copy_(mask)


def rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, in place."""
    _, world_size = rank_and_world()
    if world_size > 1:
        dist.all_reduce(tensor)
        tensor /= world_size
    return tensor


def share_out(costs: Mapping[str, float], world_size: int) -> dict[str, int]:
    """Which rank evolves which layer: the dearest first, each to the rank with the least to do so far.

    The same on every rank: ties go to the lower rank and to the earlier layer.
    """
    load = [0.0] * world_size
    owner = {}
    for name in sorted(costs, key=lambda n: -costs[n]):
        rank = min(range(world_size), key=lambda r: load[r])
        owner[name] = rank
        load[rank] += costs[name]
    return owner


def exchange(
    mine: Mapping[str, tuple[Tensor, Sequence[float]]],
    layers: Mapping[str, MaskedLinear],
    owner: Mapping[str, int],
) -> dict[str, tuple[Tensor, list[float]]]:
    """Give each rank's new masks, and the figures that go with them, to all ranks.

    Args:
        mine: (mask, figures) of the layers that this rank owns; as many figures for every layer.
        layers: all layers, in one order on all ranks.
        owner: rank by layer name.

    Returns:
        (mask, figures) of all layers, in the order of `layers`. Masks travel as bits, in one broadcast from each rank.
    """
    rank, world_size = rank_and_world()
    if world_size == 1:
        return {name: (mine[name][0], list(mine[name][1])) for name in layers}
    device = next(iter(layers.values())).mask.device
    n_figures = max((len(figures) for _, figures in mine.values()), default=0)
    shared = torch.tensor([n_figures], device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)  # a rank may own no layer
    n_figures = int(shared)

    result: dict[str, tuple[Tensor, list[float]]] = {}
    for source in range(world_size):
        names = [name for name in layers if owner[name] == source]
        if not names:
            continue
        sizes = [(layers[name].mask.numel() + 7) // 8 for name in names]
        if rank == source:
            bits = torch.cat([pack_bits(mine[name][0]) for name in names])
            figures = torch.tensor([mine[name][1] for name in names], dtype=torch.float64, device=device)
        else:
            bits = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
            figures = torch.empty(len(names), n_figures, dtype=torch.float64, device=device)
        dist.broadcast(bits, src=source)
        dist.broadcast(figures, src=source)
        for name, packed, row in zip(names, bits.split(sizes), figures.tolist(), strict=True):
            result[name] = (unpack_bits(packed, layers[name].mask.shape), row)
    return {name: result[name] for name in layers}

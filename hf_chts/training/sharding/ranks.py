"""Ranks: who evolves which layer, and how the new masks reach all of them."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hf_chts.layers.masked_layer import MaskedLayer
from hf_chts.topology.bits import pack_bits, unpack_bits


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
    layers: Mapping[str, MaskedLayer],
    owner: Mapping[str, int],
) -> dict[str, tuple[Tensor, list[float]]]:
    """Give each rank's new masks, and the figures that go with them, to all ranks.

    Args:
        mine: (mask (out, in), figures) of the layers that this rank owns; as many figures for every layer.
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
            result[name] = (unpack_bits(packed, layers[name].topology.shape), row)
    return {name: result[name] for name in layers}

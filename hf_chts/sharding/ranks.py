"""Ranks: who evolves which layer, and how the new masks reach all of them."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from hf_chts.topology.bits import unpack_bits


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
    shapes: Mapping[str, Sequence[int]],
    owner: Mapping[str, int],
    device: torch.device,
    n_figures: int = 4,
) -> Iterator[tuple[str, tuple[Tensor, list[float]]]]:
    """Give each rank's new masks, and the figures that go with them, to all ranks. Collective.

    Args:
        mine: (mask as bits, figures) of the layers that this rank owns.
        shapes: (out, in) of all layers that are exchanged, in one order on all ranks.
        owner: rank by layer name.
        device: where masks are.
        n_figures: how many figures each layer has.

    Returns:
        (name, (mask, figures)), rank by rank and in the order of `shapes`; a mask is unpacked where it is taken. Masks
        travel as bits, in one broadcast from each rank.
    """
    rank, world_size = rank_and_world()
    for source in range(world_size):
        names = [name for name in shapes if owner[name] == source]
        if not names:
            continue
        sizes = [(prod(shapes[name]) + 7) // 8 for name in names]
        bits: Sequence[Tensor]
        if world_size == 1:
            bits, figures = [mine[name][0] for name in names], [list(mine[name][1]) for name in names]
        else:
            if rank == source:
                packed = torch.cat([mine[name][0] for name in names])
                numbers = torch.tensor([mine[name][1] for name in names], dtype=torch.float64, device=device)
            else:
                packed = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
                numbers = torch.empty(len(names), n_figures, dtype=torch.float64, device=device)
            dist.broadcast(packed, src=source)
            dist.broadcast(numbers, src=source)
            bits, figures = packed.split(sizes), numbers.tolist()
        for name, some, row in zip(names, bits, figures, strict=True):
            yield name, (unpack_bits(some, tuple(shapes[name])), row)

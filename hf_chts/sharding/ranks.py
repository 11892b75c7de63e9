"""Ranks: which one evolves which layer, how new masks reach all of them, and what has to be the same on each."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
    """Assign layers to ranks: the most costly first, each to the rank with the least work so far.

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
    mine: Mapping[str, tuple[Tensor, Sequence[int]]],
    shapes: Mapping[str, Sequence[int]],
    owner: Mapping[str, int],
    device: torch.device,
    n_counts: int = 4,
) -> Iterator[dict[str, tuple[Tensor, list[int]]]]:
    """Send each rank's new masks and their counts to all ranks. Collective.

    Args:
        mine: (mask as bits, counts) of the layers that this rank owns.
        shapes: (out, in) of all layers to exchange, in the same order on all ranks.
        owner: rank by layer name.
        device: where masks are.
        n_counts: how many counts each layer has.

    Returns:
        (mask as bits, counts) by name, in the order of `shapes`, of one rank after the other. Masks are sent in one
        broadcast from each rank.
    """
    rank, world_size = rank_and_world()
    for source in range(world_size):
        names = [name for name in shapes if owner[name] == source]
        if not names:
            continue
        sizes = [(prod(shapes[name]) + 7) // 8 for name in names]
        bits: Sequence[Tensor]
        if world_size == 1:
            bits, counts = [mine[name][0] for name in names], [list(mine[name][1]) for name in names]
        else:
            if rank == source:
                packed = torch.cat([mine[name][0] for name in names])
                numbers = torch.tensor([mine[name][1] for name in names], dtype=torch.int64, device=device)
            else:
                packed = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
                numbers = torch.empty(len(names), n_counts, dtype=torch.int64, device=device)
            dist.broadcast(packed, src=source)
            dist.broadcast(numbers, src=source)
            bits, counts = packed.split(sizes), numbers.tolist()
        yield {name: (some, row) for name, some, row in zip(names, bits, counts, strict=True)}


def together(facts: Mapping[str, str] | None, problem: Exception | None = None, word: Any = None) -> Any:
    """Check that facts are the same on all ranks, and that no rank has a problem. Collective.

    Args:
        facts: by name; None if there is a problem.
        problem: the reason why this rank cannot train.
        word: rank 0 sends this to the others.

    Returns:
        Rank 0's `word`.

    Raises:
        Exception: this rank's problem.
        ValueError: another rank has a problem, or facts differ; the message names the ranks and the differences.
    """
    rank, world_size = rank_and_world()
    everyone: list[Any] = [(dict(facts or {}), str(problem) if problem else None, word)]
    if world_size > 1:
        everyone = [None] * world_size
        dist.all_gather_object(everyone, (dict(facts or {}), str(problem) if problem else None, word))
    if problem is not None:
        raise problem
    ill = {number: why for number, (_, why, _) in enumerate(everyone) if why is not None}
    if ill:
        number = min(ill)
        raise ValueError(f"rank {number} of {world_size} cannot train, so rank {rank} does not: {ill[number]}")
    first = everyone[0][0]
    differing = [
        f"{name} is {first.get(name)} on rank 0, {other.get(name)} on rank {number}"
        for number, (other, _, _) in enumerate(everyone)
        for name in sorted({*first, *other})
        if first.get(name) != other.get(name)
    ]
    if differing:
        raise ValueError(
            f"ranks differ in what they must have in common: {'; '.join(differing[:8])}. Start them all with the same "
            "config, arguments, model and version of hf_chts"
        )
    return everyone[0][2]

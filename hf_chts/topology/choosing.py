"""Choosing exactly k of n links, or of those of each layer of a stack, without replacement.

A race of exponential arrival times draws any number of candidates in proportion to their scores; `torch.multinomial`
takes at most 2^24, and a 4096x11008 layer has 45 million. The random numbers are a function of the layer's seed and
the number of the candidate, so that a choice is the same in a stack and alone, on a CPU and on a GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_chts.topology.bits import link_positions
from hf_chts.topology.compiled import loops
from hf_chts.topology.hashed_numbers import hashed, race_keys, seeds_on, unsigned

_LEAST = -(1 << 63)


def choose_each(
    scores: Tensor,
    k: Sequence[int],
    candidates: Tensor,
    seeds: Sequence[int],
    *,
    soft: bool,
    temperature: Sequence[float] | float = 1.0,
) -> Tensor:
    """Choose exactly k of the candidates of each layer.

    Args:
        scores: floating point (layers, …), finite and >= 0 on the candidates.
        k: by layer.
        candidates: bool, the shape of `scores`.
        seeds: signed 64-bit, by layer.
        soft, temperature: as for `sampling.choose`; the temperature may differ by layer.

    Returns:
        bool of the shape of `scores`.

    Raises:
        ValueError: there are fewer than k candidates, or a score is negative or not finite.
    """
    positions = link_positions(candidates)
    counts = [len(positions)] if len(k) == 1 else candidates.flatten(1).sum(1).tolist()
    values = scores.reshape(-1)[positions]
    del scores  # frees a copy of the layer, unless the caller keeps a reference
    picked = choose_among(values, counts, k, seeds, soft=soft, temperature=temperature)
    chosen = torch.zeros(candidates.numel(), dtype=torch.bool, device=candidates.device)
    chosen[positions] = picked
    return chosen.view(candidates.shape)


def choose_among(
    values: Tensor,
    counts: Sequence[int],
    k: Sequence[int],
    seeds: Sequence[int],
    *,
    soft: bool,
    temperature: Sequence[float] | float = 1.0,
) -> Tensor:
    """Like `choose_each`, of candidates that lie one after another.

    Args:
        values: floating point (candidates,), the scores of the first layer's candidates, then of the second's, …
        counts: the number of candidates, by layer.

    Returns:
        bool (candidates,).
    """
    temperatures = [float(temperature)] * len(k) if isinstance(temperature, (int, float)) else list(temperature)
    for n, available, exponent in zip(k, counts, temperatures, strict=True):
        if not 0 <= n <= available:
            raise ValueError(f"cannot choose {n} of {available} candidates")
        if exponent < 0:
            raise ValueError(f"temperature is {exponent}; it must be >= 0")
    if not any(k):
        return torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    if list(k) == list(counts):
        return torch.ones(values.shape, dtype=torch.bool, device=values.device)
    if len(k) == 1:
        return _choose_of_one(values, k[0], seeds, soft, temperatures[0])
    width = max(counts)
    equal = min(counts) == width
    if equal:
        table, valid, index = values.view(len(k), width), None, None
    else:
        numbers = torch.arange(width, device=values.device)
        count = seeds_on(counts, values.device)
        start = count.cumsum(0).sub_(count)
        index = (start + numbers).clamp_(max=len(values) - 1)
        valid = numbers < count
        table = values[index].masked_fill_(~valid, 0)
    _check(table)
    picked = _best(table, valid, counts, k, seeds_on(seeds, values.device), soft, temperatures)
    if index is None:
        return picked.view(-1)
    # the places past a layer's last candidate point at another one: they add nothing there
    return torch.zeros_like(values, dtype=torch.int8).index_add_(0, index.view(-1), picked.view(-1).to(torch.int8)) > 0


def _choose_of_one(values: Tensor, k: int, seeds: Sequence[int], soft: bool, temperature: float) -> Tensor:
    compiled = loops(values.device)
    if soft and compiled is not None and values.dtype in (torch.float32, torch.float64):
        keys = torch.empty(values.shape, dtype=torch.float64)
        if not compiled.race_keys(values.contiguous().numpy(), unsigned(seeds[0]), temperature, keys.numpy()):
            _check(values)
        return _highest(keys[None], None, [len(values)], [k], seeds_on(seeds, values.device))[0]
    _check(values)
    on_device = seeds_on(seeds, values.device)
    return _best(values[None], None, [len(values)], [k], on_device, soft, [temperature])[0]


def _check(values: Tensor) -> None:
    low, high = torch.stack(torch.aminmax(values)).tolist()
    if not (low >= 0 and high < torch.inf):
        raise ValueError(f"scores must be finite and >= 0; got a minimum of {low} and a maximum of {high}")


def _best(
    table: Tensor,
    valid: Tensor | None,
    counts: Sequence[int],
    k: Sequence[int],
    seeds: Tensor,
    soft: bool,
    temperatures: Sequence[float],
) -> Tensor:
    if soft:
        exponents: Tensor | float = temperatures[0]
        if any(other != exponents for other in temperatures):
            exponents = torch.tensor(temperatures, dtype=torch.float64).to(table.device)[:, None]
        table = race_keys(table, seeds, exponents)
    return _highest(table, valid, counts, k, seeds)


def _highest(table: Tensor, valid: Tensor | None, counts: Sequence[int], k: Sequence[int], seeds: Tensor) -> Tensor:
    """The k highest of each row, among equal ones a uniformly random choice: (layers, n) → bool (layers, n)."""
    if valid is not None:
        table = table.masked_fill(~valid, -torch.inf)
    threshold = _kth(table, k)
    above, equal = table > threshold, table == threshold
    if valid is not None:
        equal &= valid
    if min(k) == 0:
        some = seeds_on(k, table.device) > 0
        above, equal = above & some, equal & some
    more = seeds_on(k, table.device) - above.sum(1, keepdim=True)
    spare = (equal.sum(1, keepdim=True) - more).view(-1).tolist()
    if any(spare) and len(k) == 1 and table.device.type == "cpu":  # as below, in memory for the equal ones alone
        places = equal[0].nonzero()[:, 0]
        keys = hashed(~seeds[0], places)
        least = len(keys) - max(int(more), 1) + 1
        equal[0, places] = (keys >= keys.kthvalue(least).values) & (more[0] > 0)
    elif any(spare):
        # hashes of one seed differ, and ~ keeps them apart from those of the race
        keys = hashed(~seeds, torch.arange(table.shape[1], device=table.device)).masked_fill_(~equal, _LEAST)
        wanted = more.view(-1).tolist()
        equal &= keys >= _kth(keys, [max(n, 1) for n in wanted])
        equal &= more > 0
    return above.bitwise_or_(equal)


def _kth(table: Tensor, k: Sequence[int]) -> Tensor:
    """The k-th largest of each row: (layers, n) → (layers, 1)."""
    n = table.shape[1]
    ranks = [max(rank, 1) for rank in k]
    if min(ranks) == max(ranks):
        return table.kthvalue(n - ranks[0] + 1, dim=1, keepdim=True).values
    order = table.sort(dim=1, descending=True).values
    return order.gather(1, seeds_on([rank - 1 for rank in ranks], table.device))

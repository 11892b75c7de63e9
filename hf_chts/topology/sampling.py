"""Choosing exactly k of n links without replacement: the k best, or at random in proportion to a score.

`torch.multinomial` stops at 2^24 candidates, and a 4096x11008 layer has 45 million, so both samplers here are written
over cumulative sums and exponential races, in float64, with no limit on n.
"""

import torch
from torch import Tensor


def choose(
    scores: Tensor,
    k: int,
    candidates: Tensor,
    *,
    soft: bool,
    temperature: float = 1.0,
    generator: torch.Generator,
) -> Tensor:
    """Choose exactly `k` of the candidates.

    Hard keeps the k highest scores, ties broken uniformly at random. Soft draws one candidate after another without
    replacement, each with probability proportional to score^temperature among those left (arXiv 2501.19107, §3.1).
    Either way a candidate with score 0 is chosen only once no other is left, and then uniformly.

    Args:
        scores: any shape, floating point, finite and >= 0 on the candidates.
        k: how many to choose.
        candidates: bool, the shape of `scores`.
        soft: sample instead of taking the highest.
        temperature: the exponent T of the soft choice; 0 is uniform over positive scores, large is nearly hard.
        generator: on the device of `scores`.

    Returns:
        bool tensor of the shape of `scores`, exactly k True, all of them candidates.

    Raises:
        ValueError: fewer than k candidates, a negative or non-finite score, or a negative temperature.
    """
    if scores.shape != candidates.shape or candidates.dtype != torch.bool:
        raise ValueError(
            f"scores {tuple(scores.shape)} and candidates {tuple(candidates.shape)} ({candidates.dtype}) must have "
            "one shape, and candidates must be bool"
        )
    available = int(torch.count_nonzero(candidates))
    if not 0 <= k <= available:
        raise ValueError(f"cannot choose {k} of {available} candidates")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be >= 0")
    if k == 0:
        return torch.zeros_like(candidates)
    if k == available:
        return candidates.clone()

    weights = scores.masked_fill(~candidates, 0).flatten()
    del scores  # frees it where the caller keeps no name for it: one copy of a layer less at the peak
    low, high = torch.aminmax(weights)
    if not (low >= 0 and torch.isfinite(high)):
        raise ValueError(
            f"scores must be finite and >= 0; got a minimum of {low.item()} and a maximum of {high.item()}"
        )

    flat = candidates.flatten()
    chosen = torch.zeros_like(flat)
    positive = weights > 0
    n_positive = int(torch.count_nonzero(positive))
    if k >= n_positive:
        chosen |= positive
        if k > n_positive:
            _mark_uniform(chosen, flat & ~positive, k - n_positive, generator)
    elif soft:
        _mark_weighted(chosen, weights, positive, k, n_positive, temperature, generator)
    else:
        _mark_highest(chosen, weights, positive, k, n_positive, generator)
    return chosen.view_as(candidates)


def _mark_highest(
    chosen: Tensor, weights: Tensor, positive: Tensor, k: int, n: int, generator: torch.Generator
) -> None:
    threshold = torch.kthvalue(weights[positive], n - k + 1).values
    chosen |= weights > threshold
    missing = k - int(torch.count_nonzero(chosen))
    if missing:
        _mark_uniform(chosen, weights == threshold, missing, generator)


def _mark_uniform(chosen: Tensor, among: Tensor, k: int, generator: torch.Generator) -> None:
    n = int(torch.count_nonzero(among))
    if k == n:
        chosen |= among
    else:
        _mark_weighted(chosen, among.to(torch.float32), among, k, n, 1.0, generator)


def _mark_weighted(
    chosen: Tensor,
    weights: Tensor,
    positive: Tensor,
    k: int,
    n: int,
    temperature: float,
    generator: torch.Generator,
) -> None:
    """Successive sampling of k < n positive weights; marks them in `chosen`."""
    remaining = k
    # Draws with replacement, repeats thrown away, are successive sampling, and need one pass over the weights and
    # about k random numbers instead of n. Whatever repeats leave open goes to the race below, which is exact given
    # what is chosen already.
    if temperature == 1.0 and k <= n // 8:
        drawn = _draw_distinct(weights, k, generator)
        chosen[drawn] = True
        remaining -= drawn.numel()
        positive = positive.clone()
        positive[drawn] = False
    if remaining:
        index = positive.nonzero().squeeze(1)
        chosen[index[_race(weights[index], remaining, temperature, generator)]] = True


def _draw_distinct(weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """At most k distinct indices, in the order of independent draws in proportion to `weights`."""
    cumulative = weights.cumsum(0, dtype=torch.float64)
    draws = k + k // 4 + 16
    points = torch.rand(draws, dtype=torch.float64, device=weights.device, generator=generator) * cumulative[-1]
    index = torch.searchsorted(cumulative, points, right=True).clamp_(max=weights.numel() - 1)
    # rounding in the last place can land a point on a weight of 0
    index = index[weights[index] > 0]
    ordered, position = index.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    # back into the order of the draws, so that the first k distinct ones are kept
    return index[position[first].sort().values[:k]]


def _race(weights: Tensor, k: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Indices of the k smallest arrival times, which are exponential with rate weight^temperature.

    In logarithms, so that weight^temperature neither overflows nor underflows.
    """
    uniform = torch.rand(weights.shape, dtype=torch.float64, device=weights.device, generator=generator)
    # 1 - u lies in (0, 1]: a time of exactly 0 (u = 0) gives log 0 = -inf, which wins, once in 2^53 draws
    log_time = uniform.neg_().log1p_().neg_().log_()
    keys = weights.to(torch.float64).log_().mul_(temperature).sub_(log_time)
    return keys.topk(k, sorted=False).indices

"""Choosing exactly k of n links without replacement: the k best, or at random in proportion to a score.

`torch.multinomial` takes at most 2^24 candidates, and a 4096x11008 layer has 45 million. So the two samplers here work
with cumulative sums and exponential races in float64, without a limit.
"""

import torch
from torch import Tensor

from hf_chts.topology.bits import link_positions


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
    Either way, candidates with score 0 are chosen only when no others are left, and then uniformly.

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
        ValueError: there are fewer than k candidates, a score is negative or not finite, or `temperature` is < 0.
    """
    if scores.shape != candidates.shape or candidates.dtype != torch.bool:
        raise ValueError(
            f"scores {tuple(scores.shape)} and candidates {tuple(candidates.shape)} ({candidates.dtype}) must have "
            "one shape, and candidates must be bool"
        )
    index = link_positions(candidates)
    available = index.numel()
    if not 0 <= k <= available:
        raise ValueError(f"cannot choose {k} of {available} candidates")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be >= 0")
    if k == 0:
        return torch.zeros_like(candidates)
    if k == available:
        return candidates.clone()

    weights = scores.flatten()[index]
    del scores  # frees a copy of the layer, unless the caller keeps a reference
    low, high = torch.aminmax(weights)
    if not (low >= 0 and torch.isfinite(high)):
        raise ValueError(
            f"scores must be finite and >= 0; got a minimum of {low.item()} and a maximum of {high.item()}"
        )

    positive = int(torch.count_nonzero(weights))
    if k >= positive:
        picked = weights > 0
        if k > positive:
            picked |= _uniform(~picked, k - positive, generator)
    elif not soft:
        picked = _highest(weights, k, generator)
    elif temperature == 1.0 and k <= positive // 8:
        picked = _draws(weights, k, generator)
    else:
        picked = _race(weights, k, temperature, generator)
    chosen = torch.zeros(candidates.numel(), dtype=torch.bool, device=candidates.device)
    chosen[index[picked]] = True
    return chosen.view(candidates.shape)


# Below, weights are (n,), and a choice is bool (n,) or distinct indices (k,).


def _highest(weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    threshold = torch.kthvalue(weights, weights.numel() - k + 1).values
    picked = weights > threshold
    missing = k - int(torch.count_nonzero(picked))
    return picked | _uniform(weights == threshold, missing, generator)


def _uniform(among: Tensor, k: int, generator: torch.Generator) -> Tensor:
    return choose(among.to(torch.float32), k, among, soft=True, generator=generator)


def _draws(weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Sampling without replacement by independent draws ∝ `weights`, of which repeats are thrown away.

    For k much smaller than n it takes one pass over the weights and about k random numbers; the race takes n.
    """
    cumulative = weights.cumsum(0, dtype=torch.float64)
    picked = torch.zeros_like(weights, dtype=torch.bool)
    remaining = k
    for _ in range(20):
        points = torch.rand(remaining, dtype=torch.float64, device=weights.device, generator=generator)
        drawn = torch.searchsorted(cumulative, points.mul_(cumulative[-1]), right=True)
        drawn = drawn[drawn < weights.numel()]  # rounding may point past the last weight
        picked[drawn] = True
        remaining = k - int(torch.count_nonzero(picked))
        if not remaining:
            return picked
    # a few heavy weights catch most draws: a race among the others draws the rest, with the same distribution
    picked[_race(weights.masked_fill(picked, 0), remaining, 1.0, generator)] = True
    return picked


def _race(weights: Tensor, k: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Indices of the k smallest arrival times, exponential with rate weight^temperature; weights of 0 never arrive.

    In logarithms, so that weight^temperature neither overflows nor underflows.
    """
    uniform = torch.rand(weights.shape, dtype=torch.float64, device=weights.device, generator=generator)
    # for u = 0, once in 2^53 draws, the time −log(1 − u) is 0, and its logarithm −inf wins, as it should
    log_time = uniform.neg_().log1p_().neg_().log_()
    log_rate = weights.to(torch.float64).log_()
    if temperature != 1.0:
        log_rate.mul_(temperature).masked_fill_(weights == 0, -torch.inf)  # 0 · −inf is NaN
    return log_rate.sub_(log_time).topk(k, sorted=False).indices

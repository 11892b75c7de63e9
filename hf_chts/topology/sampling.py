"""Choosing exactly k of the links of one layer, without replacement: the k best, or at random by a score."""

import torch
from torch import Tensor

from hf_chts.topology.choosing import choose_each
from hf_chts.topology.random_streams import number_from


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
    return choose_each(
        scores[None], [k], candidates[None], [number_from(generator)], soft=soft, temperature=temperature
    )[0]

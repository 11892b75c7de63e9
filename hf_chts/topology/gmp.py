"""Gradual magnitude pruning (GMP, arXiv 1710.01878): the links are the largest of all present and pruned weights."""

import torch
from torch import Tensor

from hf_chts.topology.parts import register
from hf_chts.topology.sampling import choose


@register.selection("stored")
def largest_weights(weight: Tensor, mask: Tensor, stored: Tensor, links: int, generator: torch.Generator) -> Tensor:
    """The `links` largest of the present and stored weights; among equal ones a uniformly random choice.

    Args:
        weight: (out, in), 0 where there is no link.
        mask: bool (out, in).
        stored: (out, in), the last weights of removed links.

    Returns:
        bool (out, in) with exactly `links` links.

    Raises:
        ValueError: `links` is out of range, or a weight is not finite.
    """
    every = torch.ones_like(mask)
    return choose(torch.where(mask, weight, stored).abs_(), links, every, soft=False, generator=generator)


register.method(
    "gmp",
    original={"initial_sparsity": 0.0},  # from a dense model
    initial_sparsity=0.5,
    sparsity_schedule="cubic",
    regrowth="stored",
    regrown_weights="historical",
)

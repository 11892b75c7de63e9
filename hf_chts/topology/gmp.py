"""Gradual magnitude pruning (GMP, arXiv 1710.01878): the links are the largest of all present and pruned weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_chts.topology.parts import register


@register.selection("stored")
def largest_weights(weight: Tensor, mask: Tensor, stored: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """The largest of the present and stored weights; among equal ones a uniformly random choice.

    Args:
        weight: (out, in), 0 where there is no link.
        mask: bool (out, in).
        stored: (out, in), the last weights of removed links.
        choose: scores (out, in) → the mask of the highest, with the right number of links, under the pattern.

    Returns:
        bool (out, in).

    Raises:
        ValueError: a weight is not finite.
    """
    return choose(torch.where(mask, weight, stored).abs_())


register.method(
    "gmp",
    original={"initial_sparsity": 0.0},  # from a dense model
    initial_sparsity=0.5,
    sparsity_schedule="cubic",
    regrowth="stored",
    regrown_weights="historical",
)

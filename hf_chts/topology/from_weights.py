"""Topologies that are read off the weights of a trained layer: one-shot pruning, to go on from a dense model.

Weights of 0 are chosen last, and then at random, so that a layer that is sparse already keeps its best links.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_chts.topology.parts import register
from hf_chts.topology.scores import magnitude, relative_importance


@register.initial_topology("magnitude")
def largest(weight: Tensor, choose: Callable[..., Tensor]) -> Tensor:
    """The largest |w| of the layer, or of each run of a pattern, bool (out, in); among equal ones at random."""
    return choose(magnitude(weight, _everywhere(weight)))


@register.initial_topology("relative_importance")
def most_important(weight: Tensor, choose: Callable[..., Tensor]) -> Tensor:
    """The links with the largest shares of the |w| of their row and their column, bool (out, in).

    The score of arXiv 2310.15929 (RIA) without its factor of activations; see `scores.relative_importance`.
    """
    return choose(relative_importance(weight, _everywhere(weight)))


@register.initial_topology("wanda")
def wanda(weight: Tensor, input_norms: Tensor, choose: Callable[..., Tensor]) -> Tensor:
    """The largest |w_ij|·‖x_j‖ of each output, bool (out, in) (Wanda, arXiv 2306.11695, equation 1 and §3).

    Every output gets the same number of links; what does not divide goes to the first ones. Under N:M it is the largest
    of each group.

    Args:
        weight: (out, in).
        input_norms: (in,), ‖x_j‖₂ of each input feature over calibration inputs, finite and >= 0.
    """
    return choose(weight.abs() * input_norms.to(weight.dtype), by_row=True)


def _everywhere(weight: Tensor) -> Tensor:
    return torch.ones_like(weight, dtype=torch.bool)

"""Topologies that are read off the weights of a trained layer: one-shot pruning, to go on from a dense model.

Weights of 0 are chosen last, and then at random, so that a layer that is sparse already keeps its best links.
"""

import torch
from torch import Tensor

from hf_chts.topology.allocation import block_links
from hf_chts.topology.choosing import choose_each
from hf_chts.topology.parts import register
from hf_chts.topology.sampling import choose
from hf_chts.topology.scores import magnitude, relative_importance


@register.initial_topology("magnitude")
def largest(weight: Tensor, links: int, generator: torch.Generator) -> Tensor:
    """The `links` largest |w| of the layer, bool (out, in); among equal ones at random."""
    return _best(magnitude(weight, _everywhere(weight)), links, generator)


@register.initial_topology("relative_importance")
def most_important(weight: Tensor, links: int, generator: torch.Generator) -> Tensor:
    """The `links` with the largest shares of the |w| of their row and their column, bool (out, in).

    The score of arXiv 2310.15929 (RIA) without its factor of activations; see `scores.relative_importance`.
    """
    return _best(relative_importance(weight, _everywhere(weight)), links, generator)


@register.initial_topology("wanda")
def wanda(weight: Tensor, input_norms: Tensor, links: int, generator: torch.Generator) -> Tensor:
    """The largest |w_ij|·‖x_j‖ of each output, bool (out, in) (Wanda, arXiv 2306.11695, equation 1 and §3).

    Every output gets the same number of links; what does not divide goes to the first ones.

    Args:
        weight: (out, in).
        input_norms: (in,), ‖x_j‖₂ of each input feature over calibration inputs, finite and >= 0.
    """
    rows = len(weight)
    scores = weight.abs() * input_norms.to(weight.dtype)
    # each row is chosen like a layer of its own
    seeds = torch.randint(-(1 << 63), (1 << 63) - 1, (rows,), dtype=torch.int64, generator=generator).tolist()
    wanted = [block_links(links, row, rows) for row in range(rows)]
    return choose_each(scores, wanted, _everywhere(scores), seeds, soft=False)


def _everywhere(weight: Tensor) -> Tensor:
    return torch.ones_like(weight, dtype=torch.bool)


def _best(scores: Tensor, links: int, generator: torch.Generator) -> Tensor:
    return choose(scores, links, _everywhere(scores), soft=False, generator=generator)

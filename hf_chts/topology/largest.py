"""Weight-sparse training (arXiv 2511.13653): after every optimizer step the largest weights of each matrix stay.

The optimizer steps on all weights, with dense gradients and moments, and what is not among the largest is 0 again
before the next forward. So a missing link comes in with the weight that one step gives it, if that is large enough.
"""

import torch
from torch import Tensor

from hf_chts.topology.parts import register
from hf_chts.topology.sampling import choose


def neuron_floor(neurons: int, links: int, least: int) -> int:
    """The links that each of `neurons` keeps: `least`, or an equal share of `links` where those are too few."""
    return min(least, links // neurons)


@register.selection("largest", options={"least": "neuron_links"}, trains_missing=True)
def largest(weight: Tensor, neurons: int | None, links: int, generator: torch.Generator, least: int = 0) -> Tensor:
    """The `links` largest weights, of which the `neuron_floor` largest of each neuron come first.

    Among equal weights the choice is uniformly random.

    Args:
        weight: (out, in), as the optimizer's step left it.
        neurons: the dimension of `weight` that counts neurons: 0 where they are the outputs, 1 where they are the
            inputs, None where neither side is.
        least: the config's neuron_links; the paper's is 4.

    Returns:
        bool (out, in) with exactly `links` links.

    Raises:
        ValueError: `links` is out of range, or a weight is not finite.
    """
    size = weight.abs()
    first = torch.zeros_like(size, dtype=torch.bool)
    if neurons is not None:
        along = 1 - neurons
        floor = min(neuron_floor(size.shape[neurons], links, least), size.shape[along])
        first.scatter_(along, size.topk(floor, dim=along).indices, True)
    rest = choose(size, links - int(torch.count_nonzero(first)), ~first, soft=False, generator=generator)
    return first | rest


register.method(
    "topk",
    # arXiv 2511.13653: from a dense model, linear over the first half of the run, four links a neuron
    original={"neuron_links": 4, "rate_by_density": "inverse_sqrt"},
    regrowth="largest",
    initial_sparsity=0.0,
    sparsity_schedule="linear",
    sparsity_schedule_until=0.5,
    update_interval=1,
    update_until=1.0,
    neuron_links=4,
)

"""The topologies that training starts from. Each returns bool (out_features, in_features) with exactly
`links` links, and is the same for the same generator state."""

import torch
from torch import Tensor

from hf_chts.topology.allocation import check_links
from hf_chts.topology.correlated import correlated
from hf_chts.topology.parts import register
from hf_chts.topology.receptive_field import bipartite_receptive_field
from hf_chts.topology.scale_free import bipartite_scale_free
from hf_chts.topology.small_world import bipartite_small_world

__all__ = [
    "bipartite_receptive_field",
    "bipartite_scale_free",
    "bipartite_small_world",
    "correlated",
    "erdos_renyi",
]


@register.initial_topology("erdos_renyi")
def erdos_renyi(out_features: int, in_features: int, links: int, *, generator: torch.Generator) -> Tensor:
    """Every set of links equally likely, with the exact number of links."""
    check_links(out_features, in_features, links)
    numel = out_features * in_features
    # draws that repeat others are thrown away; where links are the larger part, the missing ones are drawn
    drawn = torch.zeros(numel, dtype=torch.bool, device=generator.device)
    wanted = min(links, numel - links)
    while missing := wanted - int(torch.count_nonzero(drawn)):
        drawn[torch.randint(numel, (missing,), device=drawn.device, generator=generator)] = True
    return (drawn if wanted == links else drawn.logical_not_()).view(out_features, in_features)

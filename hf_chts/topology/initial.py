"""The topologies that training starts from: functions that return bool (out_features, in_features) with exactly `links`
links, the same for the same generator state."""

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
    """`links` links, every set of them equally likely."""
    check_links(out_features, in_features, links)
    numel = out_features * in_features
    # repeated draws are thrown away; above half density, the missing links are drawn instead
    drawn = torch.zeros(numel, dtype=torch.bool, device=generator.device)
    wanted = min(links, numel - links)
    while missing := wanted - int(torch.count_nonzero(drawn)):
        drawn[torch.randint(numel, (missing,), device=drawn.device, generator=generator)] = True
    return (drawn if wanted == links else drawn.logical_not_()).view(out_features, in_features)

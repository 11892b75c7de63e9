"""A plain implementation of a topology update, to measure against: the formulas as they stand, layer after layer.

Dense fp32 products for the scores, `torch.multinomial` for soft choices, `topk` for hard ones; nothing is written.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_chts.evolution.evolver import Evolver


@torch.no_grad()
def plain_update(evolver: Evolver, method: str, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """The masks after an update of all layers by `chts`, `chtss`, `set` or `rigl` at the current sparsity.

    Args:
        evolver: its layers have dense weights.
        gradients: of the weights, by layer name; RigL's scores.
    """
    plan = evolver.plan
    assert plan is not None
    step = evolver.finished
    zeta, temperature = plan.drop_fraction(step), plan.temperature(step)
    soft = method in ("chts", "chtss")
    masks = {}
    for name, layer in evolver.sparse.layers.items():
        mask = layer.topology
        weight = layer.parameter.detach()
        links = int(mask.sum())
        drop = round(zeta * links)
        size = (weight * mask).abs()
        kept = _choose(size**temperature if soft else size, links - drop, soft)
        if soft:
            scores = ch2_l3n(kept)
        elif method == "set":
            scores = torch.rand(mask.shape, device=mask.device)
        else:
            gradient = gradients[name]
            assert gradient is not None
            scores = gradient.abs()
        masks[name] = kept | _choose(scores * ~kept, drop, soft)
    return masks


def ch2_l3n(mask: Tensor) -> Tensor:
    """U·A + (V·Aᵀ)ᵀ on missing links; bool (out, in) → float32 (out, in)."""
    links = mask.float()
    return (_strengths(links) @ links + (_strengths(links.t()) @ links.t()).t()) * ~mask


def _strengths(links: Tensor) -> Tensor:
    common = links @ links.t()
    external = (links.sum(1) - common).clamp(min=1)
    return torch.where(common > 0, (common + 1) / external, 0.0)


def _choose(scores: Tensor, k: int, soft: bool) -> Tensor:
    flat = scores.flatten()
    picked = torch.multinomial(flat, k) if soft else flat.topk(k).indices
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[picked] = True
    return chosen.view(scores.shape)

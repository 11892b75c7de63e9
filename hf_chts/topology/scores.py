"""How much a link is worth: scores by which links are removed or pruned (the highest stay), and random regrowth."""

import torch
from torch import Tensor

from hf_chts.topology.parts import register


@register.removal("magnitude")
def magnitude(weight: Tensor, mask: Tensor) -> Tensor:
    """|w| on the links, 0 elsewhere; shape and dtype of `weight`, (out, in)."""
    return (weight * mask).abs_()


@register.removal("magnitude_by_sign")
def magnitude_by_sign(weight: Tensor, mask: Tensor) -> Tensor:
    """Where |w| ranks among the links of its sign, in (0, 1), so that the lowest share of all is that of either sign.

    SET removes a fraction of the smallest positive weights and one of the largest negative ones (arXiv 1707.04780).
    Equal weights rank equally; links of weight 0, which have no sign, and what is no link have 0. float64 (out, in).
    """
    size = magnitude(weight, mask)
    # no rank may hide a weight that is none
    scores = torch.where(torch.isfinite(size), 0.0, size).to(torch.float64)
    for side in (weight > 0, weight < 0):
        chosen = side & mask & torch.isfinite(size)
        values = size[chosen]
        ordered = values.sort().values
        below, until = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
        scores[chosen] = (below + until).to(torch.float64) / max(2 * len(values), 1)
    return scores


@register.removal("relative_importance")
def relative_importance(weight: Tensor, mask: Tensor, eps: float = 1e-5) -> Tensor:
    """A link's share of the weight of its output node plus its share of that of its input node.

    |w_ij| / (sum of row i + eps) + |w_ij| / (sum of column j + eps) on the links, 0 elsewhere; shape (out, in), in
    float32 at least. From arXiv 2501.19107 (§3.3, CHTss's pruning), after RIA (arXiv 2310.15929).
    """
    size = magnitude(weight, mask)
    size = size.to(torch.promote_types(size.dtype, torch.float32))
    return size / (size.sum(1, keepdim=True) + eps) + size / (size.sum(0, keepdim=True) + eps)


@register.removal("mest")
def mest(weight: Tensor, mask: Tensor, grad: Tensor) -> Tensor:
    """|w| + 0.01·|g| on the links, 0 elsewhere; all (out, in), `grad` the gradient of the weight (arXiv 2110.14032)."""
    return ((weight.abs() + 0.01 * grad.abs()) * mask).abs_()


@register.regrowth("gradient")
def gradient(mask: Tensor, grad: Tensor) -> Tensor:
    """|g| where there is no link, 0 on the links; `grad` (out, in) is the dense gradient (RigL, arXiv 1911.11134)."""
    return grad.abs().masked_fill_(mask, 0)


@register.regrowth("random")
def random(mask: Tensor) -> Tensor:
    """The same score for every missing link, so that any choice among them is uniform (SET, arXiv 1707.04780)."""
    return (~mask).to(torch.float32)

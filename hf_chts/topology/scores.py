"""Scores by which links are removed or pruned (the highest stay), and simple ones by which they are regrown."""

import torch
from torch import Tensor

from hf_chts.topology.parts import register


@register.removal("magnitude", by_link=True, stacks=True)
def magnitude(weight: Tensor, mask: Tensor) -> Tensor:
    """|w| on the links, 0 elsewhere; shape and dtype of `weight`, (out, in)."""
    return (weight * mask).abs_()


@register.removal("magnitude_by_sign")
def magnitude_by_sign(weight: Tensor, mask: Tensor) -> Tensor:
    """The rank of |w| among the links of its sign, in (0, 1); float64 (out, in).

    So the lowest ones are a fraction of the smallest positive weights and the same fraction of the largest negative
    ones, as SET removes them (arXiv 1707.04780). Equal weights rank equally; missing links, and links of weight 0,
    which has no sign, score 0.
    """
    size = magnitude(weight, mask)
    # NaN and infinity stay, for `choose` to refuse
    scores = torch.where(torch.isfinite(size), 0.0, size).to(torch.float64)
    for side in (weight > 0, weight < 0):
        chosen = side & mask & torch.isfinite(size)
        values = size[chosen]
        ordered = values.sort().values
        below, until = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
        scores[chosen] = (below + until).to(torch.float64) / max(2 * len(values), 1)
    return scores


@register.removal("relative_importance", stacks=True)
def relative_importance(weight: Tensor, mask: Tensor, eps: float = 1e-5) -> Tensor:
    """|w_ij| / (sum of row i + eps) + |w_ij| / (sum of column j + eps) on the links, 0 elsewhere, with sums over |w|.

    Shape (out, in), at least float32. From arXiv 2501.19107 (§3.3, CHTss's pruning), after RIA (arXiv 2310.15929).
    """
    size = magnitude(weight, mask)
    size = size.to(torch.promote_types(size.dtype, torch.float32))
    return size / (size.sum(-1, keepdim=True) + eps) + size / (size.sum(-2, keepdim=True) + eps)


@register.removal("mest", by_link=True, stacks=True)
def mest(weight: Tensor, mask: Tensor, grad: Tensor) -> Tensor:
    """|w| + 0.01·|g| on the links, 0 elsewhere; all (out, in), `grad` the gradient of the weight (arXiv 2110.14032)."""
    return ((weight.abs() + 0.01 * grad.abs()) * mask).abs_()


@register.regrowth("gradient", stacks=True)
def gradient(mask: Tensor, grad: Tensor) -> Tensor:
    """|g| where there is no link, 0 on the links; `grad` (out, in) is the dense gradient (RigL, arXiv 1911.11134)."""
    return grad.abs().masked_fill_(mask, 0)


@register.regrowth("random", stacks=True)
def random(mask: Tensor) -> Tensor:
    """1 for every missing link, so that any choice among them is uniform (SET, arXiv 1707.04780); float32 (out, in)."""
    return (~mask).to(torch.float32)

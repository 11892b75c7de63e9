"""From a sparsity to whole numbers of links, of one layer or shared out among many."""

from collections.abc import Mapping

import torch
from torch import Tensor

ALLOCATIONS = ("uniform", "erdos_renyi", "global")


def links_at(numel: int, sparsity: float) -> int:
    """The number of links of a layer of `numel` weights at `sparsity`, to the nearest whole link."""
    return round(numel * (1 - sparsity))


def block_links(links: int, block: int, blocks: int) -> int:
    """The number of a layer's `links` that block number `block` of `blocks` equal blocks of its rows has."""
    return links // blocks + (block < links % blocks)


def check_links(out_features: int, in_features: int, links: int) -> int:
    """`links` again, as the number of links of a layer of out_features x in_features.

    Raises:
        ValueError: a side without a node, or a layer cannot have so many links.
    """
    if out_features < 1 or in_features < 1:
        raise ValueError(f"a layer has at least one node a side; got {out_features} x {in_features}")
    if not 0 <= links <= out_features * in_features:
        raise ValueError(
            f"links is {links}; a layer of {out_features} x {in_features} has 0 to {out_features * in_features}"
        )
    return links


def allocate_links(
    shapes: Mapping[str, tuple[int, int]],
    sparsity: float,
    how: str = "uniform",
    scores: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """Shares out the links that `sparsity` leaves of all layers together, at least one to each layer.

    The links of all layers add up to `links_at(weights of all layers, sparsity)`, to the link. What the rule gives in
    fractions of a link is rounded down, and the links left over go to the largest fractions, the first layer first
    among equals.

    Args:
        shapes: (out, in) of each layer, by name.
        sparsity: of all layers together, in [0, 1).
        how: "uniform", the same sparsity everywhere; "erdos_renyi", density in proportion to (out + in)/(out·in), so
            that links are in proportion to nodes, up to a full layer, whose excess the others share by the same rule
            (SET, arXiv 1707.04780; RigL, arXiv 1911.11134); "global", a layer has as many links as it has weights
            among those with the highest scores of all layers.
        scores: for "global", (out, in) floating point, finite and >= 0, for each layer, such as |w|; compared in
            float32. Equal scores at the threshold are shared out among layers in proportion to their number.

    Returns:
        Links by name, in the order of `shapes`.

    Raises:
        ValueError: no layer, a shape, `sparsity` or `how` that is none, fewer links than layers, or scores that are
            missing, not wanted, or not as described.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it must lie in [0, 1)")
    if not shapes:
        raise ValueError("there is no layer to share links out among: give the shape of at least one")
    for name, shape in shapes.items():
        try:
            check_links(*shape, 1)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    sizes = [shape[0] * shape[1] for shape in shapes.values()]
    total = links_at(sum(sizes), sparsity)
    if total < len(sizes):
        raise ValueError(
            f"sparsity {sparsity} leaves {total} of {sum(sizes)} links for {len(sizes)} layers: lower it, so that "
            "each layer has one"
        )
    if how not in ALLOCATIONS:
        raise ValueError(f"how is {how!r}; choose one of {', '.join(map(repr, ALLOCATIONS))}")
    if how == "global":
        if scores is None:
            raise ValueError("how is 'global', which compares scores: give those of each layer, such as |w|")
        _check_scores(shapes, scores)
        return dict(zip(shapes, _highest(scores, list(shapes), total), strict=True))
    if scores is not None:
        raise ValueError(f"how is {how!r}, which takes no scores: leave them out, or choose 'global'")
    shares = sizes if how == "uniform" else [shape[0] + shape[1] for shape in shapes.values()]
    links = apportion(torch.tensor(shares), total, torch.tensor(sizes), least=1)
    return dict(zip(shapes, links.tolist(), strict=True))


def apportion(shares: Tensor, total: int, capacity: Tensor | int, *, least: int = 0) -> Tensor:
    """Whole numbers that add up to `total`, in proportion to `shares` but within [least, capacity].

    Where the proportion leaves those bounds, the rest is in proportion among the others. Fractions are rounded down,
    and what is left over goes to the largest, the first among equals.

    Args:
        shares: (n,), any number type, positive.
        total: between n·least and the sum of `capacity`.
        capacity: (n,) int64, or one for all.

    Returns:
        int64 (n,), on the device of `shares`.
    """
    ratios = shares.to(torch.float64)
    most = torch.as_tensor(capacity, device=ratios.device).expand_as(ratios).to(torch.float64)
    # Σ clamp(factor·share) rises with the factor; where it reaches the total is found to the last bit
    low, high = 0.0, float((most / ratios).max())
    for _ in range(128):
        factor = (low + high) / 2
        if float((ratios * factor).clamp(min=least).minimum(most).sum()) < total:
            low = factor
        else:
            high = factor
    exact = (ratios * high).clamp(min=least).minimum(most)
    # a whole number may come out a rounding error too low
    whole = (exact * (1 + 2**-48)).floor().minimum(most)
    left = total - int(whole.sum())
    order = (exact - whole).masked_fill(whole >= most, -1).argsort(descending=True, stable=True)
    whole[order[:left]] += 1
    return whole.to(torch.int64)


def _check_scores(shapes: Mapping[str, tuple[int, int]], scores: Mapping[str, Tensor]) -> None:
    if set(scores) != set(shapes):
        missing, extra = sorted(set(shapes) - set(scores)), sorted(set(scores) - set(shapes))
        raise ValueError(f"the scores are not those of these layers: missing {missing[:3]}, unknown {extra[:3]}")
    for name in shapes:
        score = scores[name]
        if tuple(score.shape) != tuple(shapes[name]) or not score.is_floating_point():
            raise ValueError(
                f"the scores of {name} are {score.dtype} {tuple(score.shape)}; the layer takes floating point "
                f"{tuple(shapes[name])}"
            )
        low, high = torch.aminmax(score.to(torch.float32))
        if not (low >= 0 and torch.isfinite(high)):
            raise ValueError(
                f"the scores of {name} must be finite and >= 0; got a minimum of {low.item()} and a maximum of "
                f"{high.item()}"
            )


def _highest(scores: Mapping[str, Tensor], names: list[str], total: int) -> list[int]:
    """How many of the `total` highest scores are in each tensor, where the highest of each tensor is always one.

    The tensors are read one at a time, some times over: a mapping may make them where they are read.
    """
    wanted = total - len(names)
    best = [int(_bits(scores[name]).max()) for name in names]
    above = [0] * len(names)  # scores above the threshold, of each tensor, but for its highest
    # The threshold is found 16 bits at a time, first the upper and then, among scores that agree with it there, the
    # lower: no copy of all the scores is sorted
    upper = None
    for _ in range(2):
        counts = torch.zeros(len(names), 1 << 16, dtype=torch.int64)
        for row, name in enumerate(names):
            bits = _bits(scores[name])
            part = bits >> 16 if upper is None else (bits & 0xFFFF)[bits >> 16 == upper]
            counts[row] = torch.bincount(part, minlength=1 << 16).cpu()
            if upper is None:
                counts[row, best[row] >> 16] -= 1
            elif best[row] >> 16 == upper:
                counts[row, best[row] & 0xFFFF] -= 1
        needed = wanted - sum(above)
        or_higher = counts.sum(0).flip(0).cumsum(0).flip(0)
        value = int((or_higher >= needed).nonzero().max())
        above = [some + int(n) for some, n in zip(above, counts[:, value + 1 :].sum(1), strict=True)]
        upper, ties = value, counts[:, value]
    # of the scores at the threshold, each tensor gives in proportion
    tied = [row for row, n in enumerate(ties.tolist()) if n]
    if tied and wanted > sum(above):
        shared = apportion(ties[tied], wanted - sum(above), ties[tied])
        for row, n in zip(tied, shared.tolist(), strict=True):
            above[row] += n
    return [1 + n for n in above]


def _bits(scores: Tensor) -> Tensor:
    """float32 numbers >= 0 as whole numbers in the same order, int32, flat."""
    # + 0.0 makes 0 of −0
    return (scores.detach().to(torch.float32) + 0.0).flatten().view(torch.int32)

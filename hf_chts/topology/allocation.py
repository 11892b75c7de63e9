"""From a sparsity to numbers of links, of one layer or shared out among several."""

from collections.abc import Mapping

import torch
from torch import Tensor

ALLOCATIONS = ("uniform", "erdos_renyi", "global")


def links_at(numel: int, sparsity: float) -> int:
    """The number of links of a layer of `numel` weights at `sparsity`, rounded to a whole link."""
    return round(numel * (1 - sparsity))


def block_links(links: int, block: int, blocks: int) -> int:
    """The number of a layer's `links` that block number `block` of `blocks` equal blocks of its rows has."""
    return links // blocks + (block < links % blocks)


def check_links(out_features: int, in_features: int, links: int) -> int:
    """`links` again, if a layer of out_features x in_features can have as many.

    Raises:
        ValueError: it cannot, or a side has no node.
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
    least: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Share out the links that `sparsity` leaves to all layers together, at least one to each layer.

    They add up to exactly `links_at(weights of all layers, sparsity)`. Fractions of a link are rounded down, and the
    links left over go to the largest fractions, among equal ones to the first layers.

    Args:
        shapes: (out, in) of each layer, by name.
        sparsity: of all layers together, in [0, 1).
        how: "uniform", the same sparsity everywhere; "erdos_renyi", links in proportion to out + in, where the other
            layers share the excess of a full one by the same rule (SET, arXiv 1707.04780; RigL, arXiv 1911.11134);
            "global", by the number of a layer's weights among those with the highest scores of all layers.
        scores: only for "global": (out, in) of each layer, floating point, finite and >= 0, such as |w|. They are
            compared in float32, and equal scores at the threshold count in proportion to their number.
        least: only for "global": the fewest links of each layer, by name, from 1 to its size; 1 where absent. Layers
            that their scores would give fewer have so many, and the others share the rest by theirs.

    Returns:
        Links by name, in the order of `shapes`.

    Raises:
        ValueError: `shapes` is empty; a shape, `sparsity` or `how` is invalid; there are fewer links than layers, or
            than `least` wants; or `scores` are missing, not wanted, or not as described.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it must lie in [0, 1)")
    if not shapes:
        raise ValueError("there is no layer to share links out among: give at least one shape")
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
        fewest = {name: (least or {}).get(name, 1) for name in shapes}
        if total < sum(fewest.values()):
            raise ValueError(
                f"sparsity {sparsity} leaves {total} of {sum(sizes)} links, and the {len(sizes)} layers must have at "
                f"least {sum(fewest.values())}, such as one for each output under fan_in: lower it"
            )
        return _by_scores(scores, total, fewest)
    if scores is not None:
        raise ValueError(f"how is {how!r}, which takes no scores: leave them out, or choose 'global'")
    shares = sizes if how == "uniform" else [shape[0] + shape[1] for shape in shapes.values()]
    links = apportion(torch.tensor(shares), total, torch.tensor(sizes), least=1)
    return dict(zip(shapes, links.tolist(), strict=True))


def apportion(shares: Tensor, total: int, capacity: Tensor | int, *, least: int = 0) -> Tensor:
    """Integers that add up to `total`, in proportion to `shares` but within [least, capacity].

    If some are out of bounds in proportion, the others share the rest in proportion. Fractions are rounded down, and
    the remainder goes to the largest of them, among equal ones to the first.

    Args:
        shares: (n,), any number type, positive.
        total: between n·least and the sum of `capacity`.
        capacity: (n,) int64, or one for all.

    Returns:
        int64 (n,), on the device of `shares`.
    """
    ratios = shares.to(torch.float64)
    most = torch.as_tensor(capacity, device=ratios.device).expand_as(ratios).to(torch.float64)
    # Σ clamp(factor·share) rises with the factor; bisection finds to the last bit where it reaches the total
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
        raise ValueError(f"the scores are of other layers: missing {missing[:3]}, unknown {extra[:3]}")
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


def _by_scores(scores: Mapping[str, Tensor], total: int, fewest: Mapping[str, int]) -> dict[str, int]:
    """How many of the `total` highest scores each tensor has, and at least its fewest."""
    raised: dict[str, int] = {}
    while True:
        rest = [name for name in fewest if name not in raised]
        found = dict(zip(rest, _highest(scores, rest, total - sum(raised.values())), strict=True))
        below = {name: fewest[name] for name in rest if found[name] < fewest[name]}
        if not below:
            return {name: raised.get(name) or found[name] for name in fewest}
        raised |= below


def _highest(scores: Mapping[str, Tensor], names: list[str], total: int) -> list[int]:
    """How many of the `total` highest scores each tensor has; its own highest always counts.

    The tensors are read one at a time, several times each, so that a mapping can make them when they are read.
    """
    wanted = total - len(names)
    best = [int(_bits(scores[name]).max()) for name in names]
    above = [0] * len(names)  # scores above the threshold, without the highest of each tensor
    # Instead of sorting a copy of all scores, find the threshold 16 bits at a time: the upper half, then the lower half
    # among scores with the same upper half
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
        above = [count + int(n) for count, n in zip(above, counts[:, value + 1 :].sum(1), strict=True)]
        upper, ties = value, counts[:, value]
    # scores at the threshold count in proportion to their number
    tied = [row for row, n in enumerate(ties.tolist()) if n]
    if tied and wanted > sum(above):
        shared = apportion(ties[tied], wanted - sum(above), ties[tied])
        for row, n in zip(tied, shared.tolist(), strict=True):
            above[row] += n
    return [1 + n for n in above]


def _bits(scores: Tensor) -> Tensor:
    """float32 numbers >= 0 as integers in the same order, int32, flat."""
    # + 0.0 turns −0 into 0
    return (scores.detach().to(torch.float32) + 0.0).flatten().view(torch.int32)

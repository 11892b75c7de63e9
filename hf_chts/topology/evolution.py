"""One topology update of a stack of layers: prune → remove → regrow (arXiv 2501.19107, §3).

Percolation, which looks at coupled layers together, comes between removal and regrowth. A stack is layers of one shape,
(layers, out, in): on a GPU, where every operation has to be launched, an update takes many layers at a time. What
happens to a layer does not depend on the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_chts.topology.bits import link_positions
from hf_chts.topology.choosing import choose_among, choose_each

Seeds = Callable[[str], Sequence[int]]  # purpose → a signed 64-bit seed for each layer


@dataclass(frozen=True)
class Choice:
    """How links are chosen: hard takes the highest scores, soft samples them ∝ score^temperature.

    Attributes:
        score: gives the scores of a stack.
        temperature: one, or one for each layer.
        by_link: whether `score` may also be called with the values of links alone.
        sampler: `sampler(masks, k, seeds)`: draws what a soft regrowth would, without computing its scores.
    """

    score: Callable[..., Tensor]
    soft: bool = False
    temperature: float | Sequence[float] = 1.0
    by_link: bool = False
    sampler: Callable[[Tensor, Sequence[int], Sequence[int]], Tensor] | None = None


@dataclass(frozen=True)
class LayerEvolution:
    """What an update did to a layer."""

    mask: Tensor  # bool (out, in), the new topology
    pruned: int  # links removed because the density fell
    removed: int  # links removed to be replaced, by percolation too
    regrown: int  # links added
    returned: int  # regrown links that the same update had removed

    @property
    def overlap(self) -> float:
        """The share of the regrown links that returned; 0 where none was regrown."""
        return self.returned / self.regrown if self.regrown else 0.0


@dataclass(frozen=True)
class Removal:
    """The first half of an update.

    Attributes:
        before: links before the update, by layer.
        stay: bool (layers, out, in), the links after pruning.
        kept: those after removal, and after percolation where the config has it.
        stayed, left: links of `stay` and of `kept`, by layer.
    """

    before: list[int]
    stay: Tensor
    kept: Tensor
    stayed: list[int]
    left: list[int]


def joined(parts: Sequence[LayerEvolution]) -> LayerEvolution:
    """The result of a layer whose blocks of rows, in this order, evolved on their own."""
    if len(parts) == 1:
        return parts[0]
    return LayerEvolution(
        torch.cat([part.mask for part in parts]),
        sum(part.pruned for part in parts),
        sum(part.removed for part in parts),
        sum(part.regrown for part in parts),
        sum(part.returned for part in parts),
    )


def counts_of(masks: Tensor) -> Tensor:
    """The number of links of each layer: bool (layers, …) → int64 (layers,)."""
    return torch.count_nonzero(masks).view(1) if len(masks) == 1 else masks.flatten(1).sum(1)


def check_update(masks: Tensor, links: Sequence[int], drop_fraction: float) -> None:
    """Raises ValueError if layers of a stack cannot have these numbers of links, or ζ is out of range."""
    shape, numel = tuple(masks.shape[1:]), masks[0].numel()
    for wanted in links:
        if not 0 <= wanted <= numel:
            raise ValueError(f"links is {wanted}; a layer of {shape} has 0 to {numel}")
    if not 0 <= drop_fraction <= 1:
        raise ValueError(f"drop_fraction is {drop_fraction}; it must lie in [0, 1]")


def remove(
    weights: Tensor,
    masks: Tensor,
    *,
    links: Sequence[int],
    drop_fraction: float,
    removal: Choice,
    pruning: Choice,
    seeds: Seeds,
) -> Removal:
    """The first half of an update: prune down to `links` links, then remove a share `drop_fraction` of them.

    Args:
        weights: (layers, out, in) floating point, 0 off the masks; read only.
        masks: bool (layers, out, in); read only.
        links: the number of links after the whole update, by layer.
        drop_fraction: ζ, in [0, 1].
        removal, pruning: choose the links that *stay*; scores are called with (weights, masks), weights 0 off the
            masks.
        seeds: gives those for "pruning" and for "removal".

    Raises:
        ValueError: `links` or `drop_fraction` is out of range, or a score is negative or not finite (for example
            because a weight is NaN).
    """
    check_update(masks, links, drop_fraction)
    positions = link_positions(masks)
    before = [len(positions)] if len(masks) == 1 else counts_of(masks).tolist()
    stayed = [min(wanted, count) for wanted, count in zip(links, before, strict=True)]
    stay = masks
    if stayed != before:
        picked = _best(weights, masks, positions, before, stayed, pruning, seeds("pruning"))
        stay, positions = _mask_of(positions, picked, masks), positions[picked]
        if not removal.by_link:
            weights = weights.where(stay, 0)
    left = [count - round(drop_fraction * count) for count in stayed]
    if left == stayed:
        return Removal(before, stay, stay, stayed, left)
    picked = _best(weights, stay, positions, stayed, left, removal, seeds("removal"))
    return Removal(before, stay, _mask_of(positions, picked, masks), stayed, left)


def regrow(halves: Removal, *, links: Sequence[int], regrowth: Choice, seeds: Seeds) -> tuple[Tensor, Tensor]:
    """The second half of an update: add missing links, among them those just removed, until there are `links`.

    Args:
        halves: the first half.
        regrowth: chooses among missing links; its score is called with (kept).
        seeds: gives those for "regrowth".

    Returns:
        (the new masks, bool (layers, out, in); how many links were removed and came back, int64 (layers,)).

    Raises:
        ValueError: a score is negative or not finite.
    """
    kept, stay = halves.kept, halves.stay
    add = [wanted - left for wanted, left in zip(links, halves.left, strict=True)]
    if not any(add):
        return kept.clone(), torch.zeros(len(kept), dtype=torch.int64, device=kept.device)
    if regrowth.soft and regrowth.temperature == 1.0 and regrowth.sampler is not None:
        regrown = regrowth.sampler(kept, add, seeds("regrowth"))
    else:
        regrown = choose_each(
            regrowth.score(kept),
            add,
            ~kept,
            seeds("regrowth"),
            soft=regrowth.soft,
            temperature=regrowth.temperature,
        )
    returned = counts_of(stay & regrown)  # links that stayed and were not kept
    return regrown.bitwise_or_(kept), returned


def selected(mask: Tensor, chosen: Tensor) -> LayerEvolution:
    """The result of an update that chose all links anew: `mask` before and `chosen` after it, bool (out, in)."""
    regrown = int(torch.count_nonzero(chosen & ~mask))
    pruned = int(torch.count_nonzero(mask)) - int(torch.count_nonzero(chosen))
    return LayerEvolution(chosen, pruned, regrown, regrown, 0)


def _best(
    weights: Tensor,
    masks: Tensor,
    positions: Tensor,
    counts: Sequence[int],
    k: Sequence[int],
    choice: Choice,
    seeds: Sequence[int],
) -> Tensor:
    """Which of the links at `positions` are chosen, bool (links,)."""
    if choice.by_link:
        values = choice.score(weights, masks, positions)
    else:
        values = choice.score(weights, masks).reshape(-1)[positions]
    return choose_among(values, counts, k, seeds, soft=choice.soft, temperature=choice.temperature)


def _mask_of(positions: Tensor, picked: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    mask[positions] = picked
    return mask.view(like.shape)

"""One topology update of one layer: prune → remove → regrow (arXiv 2501.19107, §3).

Percolation, which looks at coupled layers together, comes between removal and regrowth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_chts.topology.sampling import choose


@dataclass(frozen=True)
class Choice:
    """How links are chosen: hard takes the highest scores, soft samples them ∝ score^temperature.

    `sampler(mask, k, generator=…)`: draws what a soft regrowth would, without computing its scores.
    """

    score: Callable[..., Tensor]
    soft: bool = False
    temperature: float = 1.0
    sampler: Callable[..., Tensor] | None = None


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


def remove(
    weight: Tensor,
    mask: Tensor,
    *,
    links: int,
    drop_fraction: float,
    removal: Choice,
    pruning: Choice,
    streams: Callable[[str], torch.Generator],
) -> tuple[Tensor, Tensor]:
    """The first half of an update: prune down to `links` links, then remove a share `drop_fraction` of them.

    Args:
        weight: (out, in) floating point, 0 off the mask; read only.
        mask: bool (out, in); read only.
        links: the number of links after the whole update.
        drop_fraction: ζ, in [0, 1].
        removal, pruning: choose the links that *stay*; scores are called with (weight, mask), `weight` 0 off `mask`.
        streams: gives a new generator for "pruning" and for "removal".

    Returns:
        (the links after pruning, those after removal), bool (out, in) each.

    Raises:
        ValueError: `links` or `drop_fraction` is out of range, or a score is negative or not finite (for example
            because a weight is NaN).
    """
    if not 0 <= links <= mask.numel():
        raise ValueError(f"links is {links}; a layer of {tuple(mask.shape)} has 0 to {mask.numel()}")
    if not 0 <= drop_fraction <= 1:
        raise ValueError(f"drop_fraction is {drop_fraction}; it must lie in [0, 1]")
    count = int(torch.count_nonzero(mask))
    stay = mask
    if links < count:
        stay, count = _keep(weight, mask, links, pruning, streams("pruning")), links
    drop = round(drop_fraction * count)
    if not drop:
        return stay, stay
    if stay is not mask:
        weight = weight.where(stay, 0)
    return stay, _keep(weight, stay, count - drop, removal, streams("removal"))


def regrow(
    mask: Tensor,
    stay: Tensor,
    kept: Tensor,
    *,
    links: int,
    regrowth: Choice,
    streams: Callable[[str], torch.Generator],
) -> LayerEvolution:
    """The second half of an update: add missing links, among them those just removed, until there are `links`.

    Args:
        mask: bool (out, in), the links before the update.
        stay: those after pruning.
        kept: those after removal, and after percolation where the config has it.
        regrowth: chooses among missing links; its score is called with (kept).
        streams: gives a new generator for "regrowth".

    Raises:
        ValueError: a score is negative or not finite.
    """
    before, after_pruning, left = (int(torch.count_nonzero(m)) for m in (mask, stay, kept))
    add = links - left
    if not add:
        return LayerEvolution(kept.clone(), before - after_pruning, after_pruning - left, 0, 0)
    if regrowth.soft and regrowth.temperature == 1.0 and regrowth.sampler is not None:
        regrown = regrowth.sampler(kept, add, generator=streams("regrowth"))
    else:
        regrown = choose(
            regrowth.score(kept),
            add,
            ~kept,
            soft=regrowth.soft,
            temperature=regrowth.temperature,
            generator=streams("regrowth"),
        )
    returned = int(torch.count_nonzero(stay & regrown))  # links that stayed and were not kept
    return LayerEvolution(kept | regrown, before - after_pruning, after_pruning - left, add, returned)


def selected(mask: Tensor, chosen: Tensor) -> LayerEvolution:
    """The result of an update that chose all links anew: `mask` before and `chosen` after it, bool (out, in)."""
    regrown = int(torch.count_nonzero(chosen & ~mask))
    pruned = int(torch.count_nonzero(mask)) - int(torch.count_nonzero(chosen))
    return LayerEvolution(chosen, pruned, regrown, regrown, 0)


def _keep(weight: Tensor, mask: Tensor, k: int, choice: Choice, generator: torch.Generator) -> Tensor:
    return choose(
        choice.score(weight, mask),
        k,
        mask,
        soft=choice.soft,
        temperature=choice.temperature,
        generator=generator,
    )

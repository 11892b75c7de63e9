"""One topology update of one layer: prune → remove → regrow. Percolation of coupled layers goes before regrowth."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_chts.topology.sampling import choose


@dataclass(frozen=True)
class Choice:
    """How links are chosen: by which score, and hard (the highest) or soft (sampled ∝ score^temperature).

    A `sampler(mask, k, generator=…)` draws what a soft regrowth would, without computing its scores.
    """

    score: Callable[..., Tensor]
    soft: bool = False
    temperature: float = 1.0
    sampler: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class LayerEvolution:
    """What an update did to a layer."""

    mask: Tensor  # bool (out, in), the new topology
    pruned: int  # links given up because the density fell
    removed: int  # links removed to be replaced, by percolation too
    regrown: int  # links added
    returned: int  # those of the regrown that had just been removed

    @property
    def overlap(self) -> float:
        """The share of the regrown links that had just been removed; 0 where none was regrown."""
        return self.returned / self.regrown if self.regrown else 0.0


def joined(parts: Sequence[LayerEvolution]) -> LayerEvolution:
    """What was done to a layer of which blocks of rows, in order, evolved on their own."""
    if len(parts) == 1:
        return parts[0]
    return LayerEvolution(
        torch.cat([part.mask for part in parts]),
        sum(part.pruned for part in parts),
        sum(part.removed for part in parts),
        sum(part.regrown for part in parts),
        sum(part.returned for part in parts),
    )


def evolve(
    weight: Tensor,
    mask: Tensor,
    *,
    links: int,
    drop_fraction: float,
    removal: Choice,
    regrowth: Choice,
    pruning: Choice,
    streams: Callable[[str], torch.Generator],
) -> LayerEvolution:
    """Evolve a layer's topology to exactly `links` links (arXiv 2501.19107, §3).

    Where the layer has more links than that, the lowest by the `pruning` score go first. Then a share `drop_fraction`
    of the links is removed, and missing links, those just removed among them, are added by the `regrowth` score of
    what is left, until there are `links`.

    Args:
        weight: (out, in) floating point, 0 off the mask; read only.
        mask: bool (out, in); read only.
        links: how many links there are afterwards.
        drop_fraction: ζ at this step, in [0, 1].
        removal, pruning: choose which links *stay*; scores are called with (weight, mask).
        regrowth: chooses among missing links; its score is called with (mask).
        streams: gives a new generator for "pruning", "removal" and "regrowth".

    Raises:
        ValueError: `links` or `drop_fraction` out of range, or a score that is negative or not finite (for example
            because a weight is NaN).
    """
    stay, kept = remove(
        weight,
        mask,
        links=links,
        drop_fraction=drop_fraction,
        removal=removal,
        pruning=pruning,
        streams=streams,
    )
    return regrow(mask, stay, kept, links=links, regrowth=regrowth, streams=streams)


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
    """The first half of `evolve`: (what pruning leaves, what removal leaves of that), bool (out, in) each."""
    if not 0 <= links <= mask.numel():
        raise ValueError(f"links is {links}; a layer of {tuple(mask.shape)} has 0 to {mask.numel()}")
    if not 0 <= drop_fraction <= 1:
        raise ValueError(f"drop_fraction is {drop_fraction}; it must lie in [0, 1]")
    count = int(torch.count_nonzero(mask))
    stay = mask
    if links < count:
        stay, count = _keep(weight, mask, links, pruning, streams("pruning")), links
    drop = round(drop_fraction * count)
    kept = _keep(weight, stay, count - drop, removal, streams("removal")) if drop else stay
    return stay, kept


def regrow(
    mask: Tensor,
    stay: Tensor,
    kept: Tensor,
    *,
    links: int,
    regrowth: Choice,
    streams: Callable[[str], torch.Generator],
) -> LayerEvolution:
    """The second half of `evolve`: add links to `kept` until there are `links`.

    Args:
        mask: bool (out, in), the topology before the update.
        stay: what pruning left of it.
        kept: what removal, and percolation where there is any, left of that.
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
    returned = int(torch.count_nonzero(stay & regrown))  # what is regrown was not kept: if it stayed, it was removed
    return LayerEvolution(kept | regrown, before - after_pruning, after_pruning - left, add, returned)


def selected(mask: Tensor, chosen: Tensor) -> LayerEvolution:
    """What an update did that chose all links of a layer anew; both bool (out, in)."""
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

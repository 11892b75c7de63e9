"""The two halves of a topology update under a pattern: what `evolution.py` does, with a number of links in every run.

Under fan_in a row loses a share ζ of its links, to within one, and gets as many back. Under N:M a group is too small
for a share of its own: the links that leave are chosen in the whole layer, and each group gets back what it lost.
Either way the numbers of the layer are those without a pattern.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_chts.topology.choosing import choose_each
from hf_chts.topology.evolution import Choice, Removal, Seeds, check_update, counts_of
from hf_chts.topology.patterns import Pattern, choose_in_runs, links_of_runs, shares_of_runs


def remove(
    weights: Tensor,
    masks: Tensor,
    *,
    links: Sequence[int],
    drop_fraction: float,
    removal: Choice,
    pruning: Choice,
    seeds: Seeds,
    pattern: Pattern,
) -> Removal:
    """`evolution.remove` under a pattern; `seeds` also gives those for "removal of rows".

    Raises:
        ValueError: as there, or the pattern does not have such numbers of links.
    """
    rows, columns = masks.shape[1:]
    check_update(masks, links, drop_fraction)
    of_runs = links_of_runs(masks, pattern.width(columns))
    before = of_runs.sum(1).tolist()
    stays = of_runs.minimum(pattern.numbers(links, rows, columns, masks.device))
    stayed = stays.sum(1).tolist()
    stay = masks
    if stayed != before:
        stay = _best(weights, masks, stays, pruning, seeds("pruning"))
        weights = weights.where(stay, 0)
    dropped = [round(drop_fraction * count) for count in stayed]
    left = [count - less for count, less in zip(stayed, dropped, strict=True)]
    if left == stayed:
        return Removal(before, stay, stay, stayed, left)
    if pattern.of:
        scores = removal.score(weights, stay)
        kept = choose_each(scores, left, stay, seeds("removal"), soft=removal.soft, temperature=removal.temperature)
    else:
        of_rows = stays - shares_of_runs(stays, dropped, seeds("removal of rows"))
        kept = _best(weights, stay, of_rows, removal, seeds("removal"))
    return Removal(before, stay, kept, stayed, left)


def regrow(
    halves: Removal, *, links: Sequence[int], regrowth: Choice, seeds: Seeds, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """`evolution.regrow` under a pattern. A sampler, which draws from the whole layer, is not used."""
    kept = halves.kept
    rows, columns = kept.shape[1:]
    numbers = pattern.numbers(links, rows, columns, kept.device) - links_of_runs(kept, pattern.width(columns))
    if not bool(numbers.any()):
        return kept.clone(), torch.zeros(len(kept), dtype=torch.int64, device=kept.device)
    regrown = choose_in_runs(
        regrowth.score(kept),
        numbers,
        ~kept,
        seeds("regrowth"),
        soft=regrowth.soft,
        temperature=regrowth.temperature,
    )
    return regrown | kept, counts_of(halves.stay & regrown)


def _best(weights: Tensor, masks: Tensor, numbers: Tensor, choice: Choice, seeds: Sequence[int]) -> Tensor:
    scores = choice.score(weights, masks)
    return choose_in_runs(scores, numbers, masks, seeds, soft=choice.soft, temperature=choice.temperature)

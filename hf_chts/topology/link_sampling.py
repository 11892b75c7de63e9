"""Soft L3n regrowth without the scores: draw paths, not links.

The score of a missing link (i, j) is a sum over the nodes that bridge it, U·A + (V·Aᵀ)ᵀ (link_prediction.py). So to
draw a link in proportion to its score, draw a path in proportion to its strength and take its ends: a pair of outputs
(i, a), then one of a's inputs that i lacks; or likewise a pair of inputs.

Let a have d inputs and share P of them with i. CH2 gives each of the d − P inputs that i lacks the strength
(P + 1)/(d − P), so that the whole pair weighs P + 1; CH3 gives 1/(d − P), so that the pair weighs 1. Both are drawn by
rejection: a walk i - k - a through a random link reaches the pair with probability ∝ P, and is kept with probability
(P + 1)/(2P), or 1/P. P is counted from the nodes' links as bits, only for pairs that a walk reaches. So the cost grows
with the number of links drawn, and neither the node-by-node counts nor the scores are computed.

Every draw is a function of the layer's seed and the number of the draw, and the first new links are taken in the order
of the draws. So it does not matter how many draws are made at a time, for how many layers, or by what: compiled loops
make them one by one, torch's operations in batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_chts.topology.bits import lacked_links, link_positions, pack_rows
from hf_chts.topology.choosing import choose_each
from hf_chts.topology.compiled import loops, neighbours_of
from hf_chts.topology.hashed_numbers import fractions, hashed, seeds_on, unsigned
from hf_chts.topology.link_prediction import Strength, ch2_strength, ch3_strength, node_based_scores
from hf_chts.topology.parts import register
from hf_chts.topology.random_streams import number_from
from hf_chts.topology.scores import random

# Draws for each link before the scores themselves decide the rest, and some more
_DRAWS, _MORE = 16, 1024
# The draws of a batch are at most this share of the links that a layer could have
_SHARE = 32
# Random numbers of a draw: middle node, first and second neighbour, chance, rank of the missing link
_NUMBERS, _COUNTERS = 5, 8


@dataclass(frozen=True)
class _Rule:
    """The weight of a pair of nodes: the strength of all its missing links together.

    Attributes:
        strength: of each missing link, for the scores.
        plus, times: the weight is plus + times · (links that the nodes share).
        per_link: upper bound of weight / shared links.
        at_most: upper bound of the weight; 0 if there is none.
    """

    strength: Strength
    plus: float
    times: float
    per_link: float
    at_most: float = 0.0


_CH2 = _Rule(ch2_strength, plus=1.0, times=1.0, per_link=2.0)
_CH3 = _Rule(ch3_strength, plus=1.0, times=0.0, per_link=1.0, at_most=1.0)

# propose(number of the first draw, how many) → int64 (layers, draws): positions in the stack, its size for none
_Propose = Callable[[int, int], Tensor]


def _pairs_of_links(out_features: int, in_features: int) -> float:
    # compares the links of pairs of nodes, 64 at a time, for a share of the links
    numel = out_features * in_features
    return 100 * numel + numel * (out_features + in_features) / 64


def _few_draws(out_features: int, in_features: int) -> float:
    return 50.0 * out_features * in_features


def _ch2_stack(masks: Tensor, k: Sequence[int], seeds: Sequence[int]) -> Tensor:
    return _sample(masks, k, seeds, _CH2)


def _ch3_stack(masks: Tensor, k: Sequence[int], seeds: Sequence[int]) -> Tensor:
    return _sample(masks, k, seeds, _CH3)


def _random_stack(masks: Tensor, k: Sequence[int], seeds: Sequence[int]) -> Tensor:
    return _sample(masks, k, seeds, None)


@register.sampler("ch2_l3n", cost=_pairs_of_links, stack=_ch2_stack)
def sample_ch2_l3n(mask: Tensor, k: int, *, generator: torch.Generator) -> Tensor:
    """Draw k missing links one after another, each with probability ∝ its CH2-L3n score.

    The distribution is that of `choose(ch2_l3n(mask), k, ~mask, soft=True)`, also for scores of 0.

    Args:
        mask: bool (out, in).
        k: how many links to draw.
        generator: on the device of `mask`.

    Returns:
        bool (out, in) with exactly k True, all on missing links.

    Raises:
        ValueError: there are fewer than k missing links.
    """
    return _ch2_stack(mask[None], [k], [number_from(generator)])[0]


@register.sampler("ch3_l3n", cost=_pairs_of_links, stack=_ch3_stack)
def sample_ch3_l3n(mask: Tensor, k: int, *, generator: torch.Generator) -> Tensor:
    """Like `sample_ch2_l3n`, with CH3-L3n scores."""
    return _ch3_stack(mask[None], [k], [number_from(generator)])[0]


@register.sampler("random", cost=_few_draws, stack=_random_stack)
def sample_random(mask: Tensor, k: int, *, generator: torch.Generator) -> Tensor:
    """Like `sample_ch2_l3n`, each missing link as likely as the others."""
    return _random_stack(mask[None], [k], [number_from(generator)])[0]


def _sample(masks: Tensor, k: Sequence[int], seeds: Sequence[int], rule: _Rule | None) -> Tensor:
    """Draw links for a stack of layers.

    Args:
        masks: bool (layers, out, in); read only.
        k: how many, by layer.
        seeds: signed 64-bit, by layer.
        rule: None draws uniformly.

    Returns:
        bool (layers, out, in).
    """
    layers, numel = len(masks), masks[0].numel()
    positions = link_positions(masks)
    links = [len(positions)] if layers == 1 else masks.sum((1, 2)).tolist()
    taken = torch.cat([masks.reshape(-1), masks.new_zeros(1)])
    # if many of the missing links are wanted, most draws would be repetitions
    wanted = [
        n if 0 < 4 * n <= numel - there and (there or rule is None) else 0 for n, there in zip(k, links, strict=True)
    ]
    remaining: Sequence[int] = wanted
    if any(wanted):
        if rule is None:
            remaining = _draw_uniformly(taken, layers, wanted, seeds)
        else:
            remaining = _draw_paths(taken, masks, positions, wanted, seeds, rule)
    drawn = taken[:-1].view(masks.shape).bitwise_xor_(masks)
    for layer, n in enumerate(k):
        if rest := n - wanted[layer] + remaining[layer]:
            mask, found = masks[layer], drawn[layer]
            scores = node_based_scores(mask, rule.strength) if rule else random(mask)
            valid = ~(mask | found)
            found |= choose_each(scores[None], [rest], valid[None], [seeds[layer] ^ 1], soft=True)[0]
    return drawn


def _draw_uniformly(taken: Tensor, layers: int, k: Sequence[int], seeds: Sequence[int]) -> Sequence[int]:
    numel = (len(taken) - 1) // layers
    if layers == 1 and (compiled := loops(taken.device)) is not None:
        draws = _DRAWS * k[0] + _MORE
        return [compiled.draw_uniformly(taken.numpy()[:-1], k[0], draws, unsigned(seeds[0]))]
    on_device = seeds_on(seeds, taken.device)
    start = torch.arange(layers, device=taken.device)[:, None] * numel

    def propose(first: int, draws: int) -> Tensor:
        numbers = fractions(hashed(on_device, torch.arange(first, first + draws, device=taken.device)))
        return numbers.mul_(numel).long().add_(start)

    return _in_order(propose, taken, k)


def _draw_paths(
    taken: Tensor, masks: Tensor, positions: Tensor, k: Sequence[int], seeds: Sequence[int], rule: _Rule
) -> Sequence[int]:
    """Mark up to k drawn links in `taken`, at first the masks and one more; return how many are still missing."""
    layers, rows, columns = masks.shape
    if layers == 1 and (compiled := loops(taken.device)) is not None:
        nodes, words = neighbours_of(compiled, positions, rows, columns)
        mass, apart = _mass(torch.from_numpy(nodes[-1])[None], rows, rule)
        numbers = torch.tensor(
            [rule.plus, rule.times, rule.per_link, rule.at_most, float(apart[0, 0]) + 2 * float(apart[0, 1])],
            dtype=torch.float64,
        )
        draws = _DRAWS * k[0] + _MORE
        rest = compiled.draw_paths(
            *nodes, *words, mass[0].numpy(), taken.numpy()[:-1], k[0], draws, unsigned(seeds[0]), numbers.numpy()
        )
        return [rest]
    return _in_order(_Paths(masks, positions, seeds, rule), taken, k)


def _mass(degree: Tensor, rows: int, rule: _Rule) -> tuple[Tensor, Tensor]:
    """How the middle nodes of paths share the draws out.

    Args:
        degree: int64 (layers, rows + columns).

    Returns:
        (cumulative float64 (layers, rows + columns), whether pairs of rows, and of columns, are drawn without walks:
        bool (layers, 2)). The pairs that are have all their draws at one node of the other side.
    """
    # degree² walks lead over a node
    mass = degree.to(torch.float64).square_().mul_(rule.per_link)
    over = torch.stack([mass[:, rows:].sum(1), mass[:, :rows].sum(1)], 1)
    # if nodes share many links, drawing any two is quicker than walks, which prefer pairs that share most
    pairs = torch.tensor([rows**2, (degree.shape[1] - rows) ** 2], dtype=torch.float64, device=degree.device)
    pairs.mul_(rule.at_most)
    apart = (over > pairs) & (pairs > 0)
    for side, part in enumerate((mass[:, rows:], mass[:, :rows])):
        part.masked_fill_(apart[:, side, None], 0)
        part[:, 0] = torch.where(apart[:, side], pairs[side], part[:, 0])
    return mass.cumsum(1), apart


class _Paths:
    """Draws ends of paths for a stack of layers, with torch's operations. Nodes are all rows, then all columns."""

    def __init__(self, masks: Tensor, positions: Tensor, seeds: Sequence[int], rule: _Rule) -> None:
        layers, rows, columns = self.shape = masks.shape
        self.rule = rule
        self.seeds = seeds_on(seeds, masks.device)[None]
        by_row, by_column = pack_rows(masks.reshape(-1, columns)), pack_rows(masks.mT.reshape(-1, rows))
        words = max(by_row.shape[1], by_column.shape[1])
        pad = torch.nn.functional.pad
        self.bits = torch.cat([pad(bits, (0, words - bits.shape[1])) for bits in (by_row, by_column)])
        column = positions % columns
        row = positions.div(columns, rounding_mode="floor")  # of the whole stack
        layer = row.div(rows, rounding_mode="floor")
        order = (layer * columns + column).sort(stable=True).indices
        self.neighbour = torch.cat([column, (row - layer * rows)[order]])
        degrees = [masks.sum(2).view(-1), masks.sum(1).view(-1)]
        self.degree = torch.cat(degrees)
        self.first = self.degree.cumsum(0).sub_(self.degree)
        of_layer = torch.cat([degrees[0].view(layers, rows), degrees[1].view(layers, columns)], 1)
        self.mass, self.apart = _mass(of_layer, rows, rule)
        self.some = self.mass[:, -1:] > 0
        numbers = torch.arange(layers, device=masks.device)[:, None]
        self.first_row, self.first_column = numbers * rows, numbers * columns + layers * rows
        self.start = numbers * (rows * columns)

    def __call__(self, first: int, draws: int) -> Tensor:
        """The ends of draws `first` to `first + draws`, as `_Propose` says."""
        layers, rows, columns = self.shape
        device = self.bits.device
        counters = torch.arange(first * _COUNTERS, (first + draws) * _COUNTERS, _COUNTERS, device=device)
        counters = counters + torch.arange(_NUMBERS, device=device)[:, None, None]
        middle, one, two, chance, rank = fractions(hashed(self.seeds, counters)).unbind()
        node = torch.searchsorted(self.mass, middle.mul_(self.mass[:, -1:]), right=True)
        node = node.clamp_(max=rows + columns - 1)  # where there is no mass at all
        of_rows = node >= rows  # pairs of rows meet at a column
        node = node + torch.where(of_rows, self.first_column - rows, self.first_row)
        degree, begin = self.degree[node], self.first[node]
        last = len(self.neighbour) - 1
        start, via = (
            self.neighbour[(begin + (u * degree).long()).clamp_(max=last)] if last >= 0 else begin for u in (one, two)
        )
        if self.rule.at_most:
            apart = torch.where(of_rows, self.apart[:, :1], self.apart[:, 1:])
            nodes = torch.where(of_rows, rows, columns)
            start, via = (torch.where(apart, (u * nodes).long(), found) for u, found in ((one, start), (two, via)))
        offset = torch.where(of_rows, self.first_row, self.first_column)
        mine, theirs = (start + offset).view(-1), (via + offset).view(-1)
        lacked, found = (x.view(layers, draws) for x in lacked_links(self.bits, theirs, mine, rank.reshape(-1)))
        common = self.degree[theirs].view(layers, draws) - lacked
        shared = common.to(torch.float64)
        bound = shared * self.rule.per_link
        if self.rule.at_most:
            bound = torch.where(apart, self.rule.at_most, bound)
        kept = (common > 0) & (lacked > 0) & self.some
        kept &= chance.mul_(bound) < shared.mul_(self.rule.times).add_(self.rule.plus)
        ends = torch.where(of_rows, start * columns + found, found * columns + start).add_(self.start)
        return torch.where(kept, ends, layers * rows * columns)


def _in_order(propose: _Propose, taken: Tensor, k: Sequence[int]) -> Sequence[int]:
    """Mark the first k distinct proposals that are not taken yet, by layer; return how many are still missing."""
    layers, device = len(k), taken.device
    limits = [_DRAWS * n + _MORE if n else 0 for n in k]
    limit = seeds_on(limits, device)
    remaining = torch.tensor(k, dtype=torch.int64).to(device, non_blocking=True)
    largest = max((len(taken) - 1) // layers // _SHARE, 256)
    done, draws = 0, 5 * max(k) // 2 + 64
    while True:
        draws = min(draws, largest, max(limits) - done)
        ends = propose(done, draws)
        numbers = torch.arange(done, done + draws, device=device)
        nowhere = len(taken) - 1
        ends = torch.where((numbers < limit) & ~taken[ends], ends, nowhere)
        # the same place twice: only the first counts
        ordered, order = ends.view(-1).sort(stable=True)
        repeated = torch.zeros_like(ordered, dtype=torch.bool)
        repeated[1:] = ordered[1:] == ordered[:-1]
        fresh = torch.empty_like(repeated).scatter_(0, order, ~repeated).view(layers, draws) & (ends < nowhere)
        fresh &= fresh.cumsum(1) <= remaining[:, None]
        taken.index_fill_(0, torch.where(fresh, ends, nowhere).view(-1), True)
        taken[nowhere] = False
        remaining = remaining - fresh.sum(1)
        done += draws
        left = remaining.tolist()  # the one wait of a round
        if not any(left) or done >= max(limits):
            return left
        draws = max(4 * max(left) + 64, done // 2)

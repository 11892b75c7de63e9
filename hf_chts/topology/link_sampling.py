"""Soft L3n regrowth without the scores: draw paths, not links.

The score of a missing link (i, j) is a sum over the nodes that bridge it, U·A + (V·Aᵀ)ᵀ (link_prediction.py). So a
link drawn in proportion to its score is the end of a path drawn in proportion to its strength: a pair of outputs
(i, a), then one of a's inputs that i lacks; or likewise a pair of inputs.

Let a have d inputs and share P of them with i. CH2 gives each of the d − P inputs that i lacks the strength
(P + 1)/(d − P), so the pair as a whole weighs P + 1; CH3 gives 1/(d − P), so the pair weighs 1. Both are drawn by
rejection: a walk i - k - a through a random link meets the pair with probability ∝ P, and is kept with probability
(P + 1)/(2P), or 1/P. P is counted for the pairs that are met, from the nodes' links as bits. So the cost grows with the
links drawn, and neither the node-by-node counts nor the scores, which are products of the layer's size, are made.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_chts.topology.bits import common_links, link_positions, nth_link, pack_rows
from hf_chts.topology.link_prediction import Strength, ch2_strength, ch3_strength, node_based_scores
from hf_chts.topology.parts import register
from hf_chts.topology.sampling import choose

# Rounds of draws before what is left goes to the scores themselves
_ROUNDS = 20
# Tries to meet an input that is missing before it is looked for among all of them
_TRIES = 2
# Words of rows that are looked through at a time
_WORDS_AT_A_TIME = 1 << 20


@dataclass(frozen=True)
class _Rule:
    """How a pair of nodes that share `common` links weighs, all its missing links together.

    Attributes:
        strength: of each of them, for the scores.
        weight: (common) → weight.
        per_link: the most that weight / common can be.
        at_most: the most that the weight can be; None if there is no such bound.
    """

    strength: Strength
    weight: Callable[[Tensor], Tensor]
    per_link: float
    at_most: float | None = None


_CH2 = _Rule(ch2_strength, lambda common: common + 1, per_link=2.0)
_CH3 = _Rule(ch3_strength, torch.ones_like, per_link=1.0, at_most=1.0)


def _pairs_of_links(out_features: int, in_features: int) -> float:
    # pairs of nodes are compared by their links, 64 at a time, for a share of the links
    numel = out_features * in_features
    return 100 * numel + numel * (out_features + in_features) / 64


@register.sampler("ch2_l3n", cost=_pairs_of_links)
def sample_ch2_l3n(mask: Tensor, k: int, *, generator: torch.Generator) -> Tensor:
    """Draw k missing links one after another, each ∝ its CH2-L3n score among those left.

    The distribution is that of `choose(ch2_l3n(mask), k, ~mask, soft=True)`, and so are the rules for scores of 0.

    Args:
        mask: bool (out, in).
        k: how many links to draw.
        generator: on the device of `mask`.

    Returns:
        bool (out, in) with exactly k True, none of them on a link.

    Raises:
        ValueError: there are fewer than k missing links.
    """
    return _sample(mask, k, _CH2, generator)


@register.sampler("ch3_l3n", cost=_pairs_of_links)
def sample_ch3_l3n(mask: Tensor, k: int, *, generator: torch.Generator) -> Tensor:
    """As `sample_ch2_l3n`, with CH3-L3n scores."""
    return _sample(mask, k, _CH3, generator)


def _sample(mask: Tensor, k: int, rule: _Rule, generator: torch.Generator) -> Tensor:
    missing = mask.numel() - int(torch.count_nonzero(mask))
    taken = mask.clone()
    remaining = k
    # Where a large part of the missing links is wanted, most draws would repeat others
    if 0 < 4 * k <= missing:
        remaining = _draw_paths(taken, mask, k, rule, generator)
    if remaining:
        scores = node_based_scores(mask, rule.strength)
        return (taken | choose(scores, remaining, ~taken, soft=True, generator=generator)) & ~mask
    return taken & ~mask


def _draw_paths(taken: Tensor, mask: Tensor, k: int, rule: _Rule, generator: torch.Generator) -> int:
    """Mark up to k drawn links in `taken`, which starts as a copy of `mask`; returns how many are still to be drawn."""
    of_outputs, of_inputs = _Neighbours.of(mask), _Neighbours.of(mask.t())
    outputs = _Pairs(of_outputs, of_inputs, rule, generator)
    inputs = _Pairs(of_inputs, of_outputs, rule, generator)
    total = outputs.mass + inputs.mass
    width = mask.shape[1]
    flat = taken.view(-1)
    remaining, draws = k, 2 * k
    for _ in range(_ROUNDS):
        if not remaining or not total:
            break
        side = torch.rand(draws + 64, dtype=torch.float64, device=mask.device, generator=generator).mul_(total)
        # in the order of the draws, whichever side they come from: the first that are new are taken
        order = torch.cat([(side < outputs.mass).nonzero()[:, 0], (side >= outputs.mass).nonzero()[:, 0]])
        by_outputs = int((side < outputs.mass).sum())
        kept, out, inn = outputs.draw(by_outputs)
        also_kept, other_inn, other_out = inputs.draw(len(side) - by_outputs)
        ends = torch.cat([out * width + inn, other_out * width + other_inn])
        ends = ends[order[torch.cat([kept, also_kept + by_outputs])].argsort()]
        fresh = _first_distinct(ends[~flat[ends]], remaining)
        flat[fresh] = True
        remaining -= len(fresh)
        # as many draws for each link as it took now, and some
        draws = min(3 * draws * remaining // (2 * max(len(fresh), 1)), mask.numel())
    return remaining


def _first_distinct(values: Tensor, k: int) -> Tensor:
    """The first k distinct values, or all there are, of an int64 tensor (n,)."""
    ordered, position = values.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return values[position[first].sort().values[:k]]


@dataclass(frozen=True)
class _Neighbours:
    """The links of the nodes on one side of a layer.

    Attributes:
        bits: int64 (nodes, words), each node's links as bits.
        first: int64 (nodes + 1,), where the neighbours of each node begin in `neighbour`.
        neighbour: int64 (links,), node after node, ascending.
        degree: int64 (nodes,).
    """

    bits: Tensor
    first: Tensor
    neighbour: Tensor
    degree: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> "_Neighbours":
        """Of the rows of bool (nodes, others)."""
        mask = mask.contiguous()
        nodes, others = mask.shape
        positions = link_positions(mask)
        first = torch.searchsorted(positions, torch.arange(nodes + 1, device=mask.device) * others)
        return cls(pack_rows(mask), first, positions % others, first.diff())

    def one_of(self, nodes: Tensor, generator: torch.Generator) -> Tensor:
        """A random neighbour of each of `nodes`, int64 (n,), which all have one."""
        degree = self.degree[nodes]
        step = torch.rand(nodes.shape, dtype=torch.float64, device=nodes.device, generator=generator)
        # the product of a number close to 1 may be rounded up to the degree
        step = step.mul_(degree).long().minimum(degree - 1)
        return self.neighbour[self.first[nodes] + step]

    def has(self, nodes: Tensor, others: Tensor) -> Tensor:
        """Whether there is a link between each of `nodes` and each of `others`, int64 (n,) both."""
        return (self.bits[nodes, others >> 6] >> (others & 63)).bitwise_and_(1).bool()


class _Pairs:
    """Pairs of nodes (i, a) of one side of a layer, each with one of a's links that i lacks, by their weight.

    Args:
        nodes: the links of this side's nodes.
        others: those of the other side's.

    Attributes:
        mass: what `draw` is to be called in proportion to.
    """

    def __init__(self, nodes: _Neighbours, others: _Neighbours, rule: _Rule, generator: torch.Generator) -> None:
        self.nodes, self.others, self.rule, self.generator = nodes, others, rule, generator
        # a node of degree e on the other side lies on e² walks
        self.walks = others.degree.to(torch.float64).square_().cumsum(0)
        by_walks = rule.per_link * float(self.walks[-1])
        # where nodes share many links, any two are met sooner than by walks, which prefer those that share most
        everywhere = float("inf") if rule.at_most is None else rule.at_most * len(nodes.degree) ** 2
        self.by_walks = by_walks <= everywhere
        self.mass = min(by_walks, everywhere) if by_walks else 0.0

    def draw(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """n draws, of which those are kept that are a path: (which of the n, first node i, last node on the other
        side), int64 each."""
        node, via = self._walk(n) if self.by_walks else self._any_two(n)
        common = common_links(self.nodes.bits, node, via).to(torch.float64)
        bound = self.rule.per_link * common if self.by_walks else float(self.rule.at_most or 0)
        chance = torch.rand(n, dtype=torch.float64, device=node.device, generator=self.generator).mul_(bound)
        kept = ((common > 0) & (common < self.nodes.degree[via]) & (chance < self.rule.weight(common))).nonzero()[:, 0]
        node, via = node[kept], via[kept]
        return kept, node, self._missing(node, via)

    def _walk(self, n: int) -> tuple[Tensor, Tensor]:
        points = torch.rand(n, dtype=torch.float64, device=self.walks.device, generator=self.generator)
        middle = torch.searchsorted(self.walks, points.mul_(self.walks[-1]), right=True)
        # rounding in the last place can end beyond the last node, or on one without links
        last = torch.searchsorted(self.walks, self.walks[-1:])
        middle = middle.minimum(last)
        return self.others.one_of(middle, self.generator), self.others.one_of(middle, self.generator)

    def _any_two(self, n: int) -> tuple[Tensor, Tensor]:
        degree = self.nodes.degree
        first, second = torch.randint(len(degree), (2, n), device=degree.device, generator=self.generator)
        return first, second

    def _missing(self, node: Tensor, via: Tensor) -> Tensor:
        """One of the neighbours of each of `via` that the node beside it lacks, each as likely; there is one."""
        found = self.nodes.one_of(via, self.generator)
        again = self.nodes.has(node, found).nonzero()[:, 0]
        for _ in range(_TRIES):
            if not len(again):
                return found
            found[again] = self.nodes.one_of(via[again], self.generator)
            again = again[self.nodes.has(node[again], found[again])]
        bits = self.nodes.bits
        for some in again.split(max(1, _WORDS_AT_A_TIME // bits.shape[1])):
            rank = torch.rand(len(some), dtype=torch.float64, device=bits.device, generator=self.generator)
            found[some] = nth_link(bits[via[some]] & ~bits[node[some]], rank)
        return found

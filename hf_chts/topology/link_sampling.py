"""Soft L3n regrowth without the scores: draw paths, not links.

The score of a missing link (i, j) is a sum over the nodes that bridge it, U·A + (V·Aᵀ)ᵀ (link_prediction.py). So to
draw a link in proportion to its score, draw a path in proportion to its strength and take its ends: a pair of outputs
(i, a), then one of a's inputs that i lacks; or likewise a pair of inputs.

Let a have d inputs and share P of them with i. CH2 gives each of the d − P inputs that i lacks the strength
(P + 1)/(d − P), so that the whole pair weighs P + 1; CH3 gives 1/(d − P), so that the pair weighs 1. Both are drawn by
rejection: a walk i - k - a through a random link reaches the pair with probability ∝ P, and is kept with probability
(P + 1)/(2P), or 1/P. P is counted from the nodes' links as bits, only for pairs that a walk reaches. So the cost grows
with the number of links drawn, and neither the node-by-node counts nor the scores are computed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_chts.topology.bits import common_links, link_positions, nth_link, pack_rows
from hf_chts.topology.link_prediction import Strength, ch2_strength, ch3_strength, node_based_scores
from hf_chts.topology.parts import register
from hf_chts.topology.sampling import choose

# Rounds of draws before the scores themselves decide the rest
_ROUNDS = 20
# Tries to draw a missing input before searching all inputs
_TRIES = 2
# Words of rows to search at a time
_WORDS_AT_A_TIME = 1 << 20


@dataclass(frozen=True)
class _Rule:
    """The weight of a pair of nodes: the strength of all its missing links together.

    Attributes:
        strength: of each missing link, for the scores.
        weight: (links that the nodes share) → weight.
        per_link: upper bound of weight / shared links.
        at_most: upper bound of the weight; None if there is none.
    """

    strength: Strength
    weight: Callable[[Tensor], Tensor]
    per_link: float
    at_most: float | None = None


_CH2 = _Rule(ch2_strength, lambda common: common + 1, per_link=2.0)
_CH3 = _Rule(ch3_strength, torch.ones_like, per_link=1.0, at_most=1.0)


def _pairs_of_links(out_features: int, in_features: int) -> float:
    # compares the links of pairs of nodes, 64 at a time, for a share of the links
    numel = out_features * in_features
    return 100 * numel + numel * (out_features + in_features) / 64


@register.sampler("ch2_l3n", cost=_pairs_of_links)
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
    return _sample(mask, k, _CH2, generator)


@register.sampler("ch3_l3n", cost=_pairs_of_links)
def sample_ch3_l3n(mask: Tensor, k: int, *, generator: torch.Generator) -> Tensor:
    """Like `sample_ch2_l3n`, with CH3-L3n scores."""
    return _sample(mask, k, _CH3, generator)


def _sample(mask: Tensor, k: int, rule: _Rule, generator: torch.Generator) -> Tensor:
    missing = mask.numel() - int(torch.count_nonzero(mask))
    taken = mask.clone()
    remaining = k
    # If many of the missing links are wanted, most draws would be repetitions
    if 0 < 4 * k <= missing:
        remaining = _draw_paths(taken, mask, k, rule, generator)
    if remaining:
        scores = node_based_scores(mask, rule.strength)
        return (taken | choose(scores, remaining, ~taken, soft=True, generator=generator)) & ~mask
    return taken & ~mask


def _draw_paths(taken: Tensor, mask: Tensor, k: int, rule: _Rule, generator: torch.Generator) -> int:
    """Mark up to k drawn links in `taken`, at first a copy of `mask`; return how many are still missing."""
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
        # the first new links are taken, in the order of the draws, whichever side they come from
        order = torch.cat([(side < outputs.mass).nonzero()[:, 0], (side >= outputs.mass).nonzero()[:, 0]])
        by_outputs = int((side < outputs.mass).sum())
        kept, out, inn = outputs.draw(by_outputs)
        also_kept, other_inn, other_out = inputs.draw(len(side) - by_outputs)
        ends = torch.cat([out * width + inn, other_out * width + other_inn])
        ends = ends[order[torch.cat([kept, also_kept + by_outputs])].argsort()]
        fresh = _first_distinct(ends[~flat[ends]], remaining)
        flat[fresh] = True
        remaining -= len(fresh)
        # as many draws per link as this round took, and half as many again
        draws = min(3 * draws * remaining // (2 * max(len(fresh), 1)), mask.numel())
    return remaining


def _first_distinct(values: Tensor, k: int) -> Tensor:
    """The first k distinct values, or all if there are fewer, of an int64 tensor (n,)."""
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
        """A random neighbour of each of `nodes`, int64 (n,); each has one."""
        degree = self.degree[nodes]
        step = torch.rand(nodes.shape, dtype=torch.float64, device=nodes.device, generator=generator)
        # with a number close to 1, the product may be rounded up to the degree
        step = step.mul_(degree).long().minimum(degree - 1)
        return self.neighbour[self.first[nodes] + step]

    def has(self, nodes: Tensor, others: Tensor) -> Tensor:
        """Whether there is a link between each of `nodes` and each of `others`, int64 (n,) both."""
        return (self.bits[nodes, others >> 6] >> (others & 63)).bitwise_and_(1).bool()


class _Pairs:
    """Draws pairs of nodes (i, a) of one side of a layer by their weight, each with one of a's links that i lacks.

    Args:
        nodes: the links of this side's nodes.
        others: the links of the other side's nodes.

    Attributes:
        mass: the number of calls of `draw` must be in proportion to it.
    """

    def __init__(self, nodes: _Neighbours, others: _Neighbours, rule: _Rule, generator: torch.Generator) -> None:
        self.nodes, self.others, self.rule, self.generator = nodes, others, rule, generator
        # e² walks lead over a node of degree e on the other side
        self.walks = others.degree.to(torch.float64).square_().cumsum(0)
        by_walks = rule.per_link * float(self.walks[-1])
        # if nodes share many links, drawing any two is quicker than walks, which prefer pairs that share most
        everywhere = float("inf") if rule.at_most is None else rule.at_most * len(nodes.degree) ** 2
        self.by_walks = by_walks <= everywhere
        self.mass = min(by_walks, everywhere) if by_walks else 0.0

    def draw(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Make n draws: (which of them gave a path, its first node i, its last node on the other side), int64 each."""
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
        # rounding may point past the last node, or at one without links
        last = torch.searchsorted(self.walks, self.walks[-1:])
        middle = middle.minimum(last)
        return self.others.one_of(middle, self.generator), self.others.one_of(middle, self.generator)

    def _any_two(self, n: int) -> tuple[Tensor, Tensor]:
        degree = self.nodes.degree
        first, second = torch.randint(len(degree), (2, n), device=degree.device, generator=self.generator)
        return first, second

    def _missing(self, node: Tensor, via: Tensor) -> Tensor:
        """A uniformly drawn neighbour of each of `via` that its counterpart in `node` lacks; there is one."""
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

"""Soft L3n regrowth without the scores: sample paths, not links.

The score of a missing link is a sum over the nodes that bridge it, U·A + (V·Aᵀ)ᵀ (link_prediction.py). So a link drawn
in proportion to its score is the end of a path drawn in proportion to its strength: first a pair of outputs (i, a) with
probability ∝ U[i, a]·degree(a), then one of a's inputs j, uniformly; or likewise a pair of inputs. Paths that end on a
link, or on one drawn before, are thrown away. That takes neither of the two products that make the scores, which are
most of their cost, nor a pass over the layer's missing links.
"""

import torch
from torch import Tensor

from hf_chts.topology.bits import link_positions
from hf_chts.topology.link_prediction import Strength, bridges, ch2_strength, ch3_strength, node_based_scores
from hf_chts.topology.sampling import choose

# Rounds of draws before what is left goes to the scores themselves. Each round leaves the share that hit a link.
_ROUNDS = 20


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
    return _sample(mask, k, ch2_strength, generator)


def sample_ch3_l3n(mask: Tensor, k: int, *, generator: torch.Generator) -> Tensor:
    """As `sample_ch2_l3n`, with CH3-L3n scores."""
    return _sample(mask, k, ch3_strength, generator)


def _sample(mask: Tensor, k: int, strength: Strength, generator: torch.Generator) -> Tensor:
    links = int(torch.count_nonzero(mask))
    missing = mask.numel() - links
    taken = mask.clone()
    remaining = k
    # Where many of the missing links are wanted, or most paths end on a link, the scores are the cheaper way; and in
    # very oblong layers the pairs of the longer side would take more memory than the scores.
    if 0 < 8 * k <= missing and 2 * missing >= mask.numel() and max(mask.shape) <= 4 * min(mask.shape):
        remaining = _draw_paths(taken, mask, k, strength, generator)
    if remaining:
        scores = node_based_scores(mask, strength)
        return (taken | choose(scores, remaining, ~taken, soft=True, generator=generator)) & ~mask
    return taken & ~mask


def _draw_paths(taken: Tensor, mask: Tensor, k: int, strength: Strength, generator: torch.Generator) -> int:
    """Mark up to k drawn links in `taken`, which starts as a copy of `mask`; returns how many are missing."""
    weights = mask.to(torch.float32)
    outputs, inputs = _Paths(mask, weights, strength), _Paths(mask.t(), weights.t(), strength)
    del weights
    total = outputs.total + inputs.total
    width = mask.shape[1]
    flat = taken.view(-1)
    remaining, draws = k, 2 * k
    for _ in range(_ROUNDS):
        if not remaining or not total:
            break
        points = torch.rand(draws + 64, dtype=torch.float64, device=mask.device, generator=generator)
        points.mul_(total)
        by_outputs = points < outputs.total
        ends = torch.empty(points.shape, dtype=torch.int64, device=mask.device)
        out, inn, real = outputs.ends(points[by_outputs], generator)
        ends[by_outputs] = torch.where(real, out * width + inn, -1)
        inn, out, real = inputs.ends(points[~by_outputs] - outputs.total, generator)
        ends[~by_outputs] = torch.where(real, out * width + inn, -1)
        ends = ends[ends >= 0]
        fresh = ends[~flat[ends]]
        fresh = _first_distinct(fresh, remaining)
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


class _Paths:
    """All paths that start with a pair of nodes on the side of the rows of `mask` (nodes, others), by strength."""

    def __init__(self, mask: Tensor, weights: Tensor, strength: Strength) -> None:
        nodes = mask.shape[0]
        # neighbours of every node, one after another
        degree = weights.sum(1)
        self.degree = degree.long()
        self.first = self.degree.cumsum(0) - self.degree
        self.neighbour = (link_positions(mask) % mask.shape[1]).to(torch.int32)
        # Running sums over each row of strength · degree. In float32 a weight is off by 1e-7 of its row's sum at most.
        self.running = torch.empty(nodes, nodes, dtype=torch.float32, device=mask.device)
        for rows, pairs in bridges(mask, weights, strength):
            pairs.mul_(degree)
            # a pair of a node with itself leads only to its own links
            pairs.diagonal(rows.start).zero_()
            torch.cumsum(pairs, 1, out=self.running[rows])
        self.mass = self.running[:, -1].cumsum(0, dtype=torch.float64)
        self.total = float(self.mass[-1])

    def ends(self, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The paths at `points` in [0, total), float64 (draws,): (first node, last node, whether there is a path)."""
        row = torch.searchsorted(self.mass, points, right=True).clamp_(max=len(self.mass) - 1)
        within = (points - (self.mass[row] - self.running[row, -1])).to(torch.float32)
        via = self._search(row, within)
        step = torch.rand(via.shape, dtype=torch.float64, device=via.device, generator=generator)
        offset = self.first[via] + (step * self.degree[via]).long()
        # rounding in the last place can land on a pair of strength 0
        below = self.running[row, (via - 1).clamp_(min=0)].masked_fill_(via == 0, 0)
        real = self.running[row, via] > below
        return row, self.neighbour[offset.clamp_(max=len(self.neighbour) - 1)].long(), real

    def _search(self, row: Tensor, value: Tensor) -> Tensor:
        """The first position in each of the rows whose running sum exceeds `value`, the last if none does."""
        nodes = self.running.shape[1]
        # how many of a row's sums do not exceed the value, found bit by bit from the highest
        running, start = self.running.view(-1), row * nodes - 1
        count = torch.zeros_like(row)
        for bit in reversed(range(nodes.bit_length())):
            probe = (count + (1 << bit)).clamp_(max=nodes)
            count = torch.where(running.index_select(0, start + probe) <= value, probe, count)
        return count.clamp_(max=nodes - 1)

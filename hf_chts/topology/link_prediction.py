"""Cannistraci-Hebb link prediction on bipartite layers: how likely each missing link is.

These are the node-based scores (L3n). The path-based ones (L3p), for small layers, are in `path_based.py`, and can be
imported from here too.

A missing link between output i and input j is bridged by paths of length three, i - b - a - j: b is an input of i, a
is an output that shares inputs with i. The node-based scores (arXiv 2501.19107, §3.2 and App. B) judge each bridging
node by its links inside the community of common neighbours against those that leave it, so a layer costs matrix
products instead of an enumeration of paths.
"""

import time
from collections.abc import Callable, Iterator
from functools import cache
from math import inf

import torch
from torch import Tensor

from hf_chts.topology.bits import link_positions
from hf_chts.topology.compiled import loops, neighbours_of
from hf_chts.topology.parts import register
from hf_chts.topology.path_based import ch2_l3p, ch3_l3p, check_mask

__all__ = ["ch2_l3n", "ch2_l3p", "ch3_1_l3n", "ch3_l3n", "ch3_l3p"]

# Rows of the node-by-node matrices to hold at a time. Whole, (out, out) or (in, in), they would be n/m copies of an
# m x n layer.
_BLOCK_ROWS = 128
# Multiplications of a dense product, in fp32 or with 8 bits, in the time of one increment of a count
_PER_INCREMENT, _PER_INCREMENT_OF_8_BIT = 80, 200

# strength(common neighbours, links that leave the community) of pairs of nodes; may overwrite its first argument
Strength = Callable[[Tensor, Tensor], Tensor]


def _two_products(out_features: int, in_features: int) -> float:
    numel = out_features * in_features
    return 100 * numel + 4 * numel * (out_features + in_features)


@register.regrowth("ch2_l3n", cost=_two_products, stacks=True)
def ch2_l3n(mask: Tensor) -> Tensor:
    """CH2-L3n scores: (common neighbours + 1) over the links that leave the community.

    Args:
        mask: bool (out, in).

    Returns:
        float32 (out, in), 0 on the links and where no path of length three leads.
    """
    return node_based_scores(mask, ch2_strength)


@register.regrowth("ch3_l3n", cost=_two_products, stacks=True)
def ch3_l3n(mask: Tensor) -> Tensor:
    """CH3-L3n scores: as `ch2_l3n` with 1 in the numerator; bool (out, in) → float32 (out, in)."""
    return node_based_scores(mask, ch3_strength)


@register.regrowth("ch3_1_l3n", cost=_two_products, stacks=True)
def ch3_1_l3n(mask: Tensor) -> Tensor:
    """CH3.1-L3n scores: as `ch2_l3n` with (x + 1)^(1 + x/(1 + x)) in the denominator, where x is the number of links
    that leave the community, less the one to the seed; bool (out, in) → float32 (out, in).

    So a node with many links out of the community counts for less than in CH2-L3n, whose denominator is x + 1: the
    exponent goes from 1 at x = 0 towards 2.
    """
    return node_based_scores(mask, ch3_1_strength)


def ch2_strength(common: Tensor, external: Tensor) -> Tensor:
    # common + 1 where there is a common neighbour, 0 elsewhere: counts are whole numbers
    return common.add_(common.clamp(max=1)).div_(external)


def ch3_strength(common: Tensor, external: Tensor) -> Tensor:
    return common.clamp_(max=1).div_(external)


def ch3_1_strength(common: Tensor, external: Tensor) -> Tensor:
    # with external = x + 1, the exponent is 1 + (external − 1)/external
    return common.add_(common.clamp(max=1)).div_(external.pow(2 - 1 / external))


def node_based_scores(mask: Tensor, strength: Strength) -> Tensor:
    """score = U·A + (V·Aᵀ)ᵀ, with U over pairs of outputs and V over pairs of inputs.

    Args:
        mask: bool (out, in), or (layers, out, in).
        strength: of pairs of nodes.

    Returns:
        float32 of the mask's shape.
    """
    if mask.dim() != 3:
        check_mask(mask)
        return _scores(mask, strength)
    if mask.device.type == "cpu":
        scores = [_scores(one, strength) for one in mask]
        return scores[0][None] if len(scores) == 1 else torch.stack(scores)
    return _scores_of_stack(mask, strength)


def _scores(mask: Tensor, strength: Strength) -> Tensor:
    links = mask.to(torch.float32)
    scores = torch.empty_like(links)
    for rows, pairs in bridges(mask, links, strength):
        torch.mm(pairs, links, out=scores[rows])
    for rows, pairs in bridges(mask.t(), links.t(), strength):
        scores[:, rows].addmm_(links, pairs.t())
    return scores.masked_fill_(mask, 0)


def _scores_of_stack(masks: Tensor, strength: Strength) -> Tensor:
    """`_scores` of layers of one shape with batched products, for devices on which each operation is launched."""
    links = masks.to(torch.float32)
    scores = torch.empty_like(links)
    for matrices, into in ((links, scores), (links.mT, scores.mT)):
        degree = matrices.sum(2)[:, None]
        for start in range(0, matrices.shape[1], _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            common = matrices[:, rows] @ matrices.mT
            pairs = strength(common, (degree - common).clamp_(min=1)) @ matrices
            if into is scores:
                into[:, rows] = pairs
            else:
                into[:, rows] += pairs
    return scores.masked_fill_(masks, 0)


def bridges(mask: Tensor, links: Tensor, strength: Strength) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, strengths of the pairs (i, j) of nodes for i in rows and all j) over the nodes of the rows.

    `links` is `mask` in float32, (nodes, others).
    """
    degree = links.sum(1)
    if (counted := _common_by_links(mask)) is not None:
        for rows, common in counted:
            yield rows, strength(common, (degree - common).clamp_(min=1))
        return
    # Both products count exactly. 8-bit ones need the nodes as the fast dimension of both operands, and restrict shapes
    # on CUDA.
    integer = links.device.type == "cpu" and _integer_products_are_faster()
    # cloned, because contiguous() keeps the strides of a matrix of one row, and the product would read past its end
    by_neighbour = mask.t().clone(memory_format=torch.contiguous_format).view(torch.int8) if integer else links.t()
    for start in range(0, links.shape[0], _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        block = by_neighbour[:, rows].t()
        common = torch._int_mm(block, by_neighbour).float() if integer else block @ by_neighbour  # (block, nodes)
        external = (degree - common).clamp_(min=1)
        yield rows, strength(common, external)


def _common_by_links(mask: Tensor) -> Iterator[tuple[slice, Tensor]] | None:
    """(rows, the common neighbours of each of them and all others, float32), counted link by link.

    None if a product counts faster: a node of the other side with e links adds one to e² pairs, and a product takes
    nodes² · others multiplications and additions, many at a time.
    """
    if (compiled := loops(mask.device)) is None:
        return None
    nodes, others = mask.shape
    increments = float(mask.view(torch.uint8).sum(0, dtype=torch.int64).to(torch.float64).square_().sum())
    if increments * (_PER_INCREMENT_OF_8_BIT if _integer_products_are_faster() else _PER_INCREMENT) > nodes**2 * others:
        return None
    lists, _ = neighbours_of(compiled, link_positions(mask), nodes, others)

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, nodes, _BLOCK_ROWS):
            common = torch.zeros(min(_BLOCK_ROWS, nodes - start), nodes)
            compiled.common_neighbours(*lists, start, nodes, common.numpy())
            yield slice(start, start + _BLOCK_ROWS), common

    return blocks()


@cache
def _integer_products_are_faster() -> bool:
    """Whether 8-bit products take less time than fp32 ones on this processor: measured once, in a few milliseconds.

    With AVX512-VNNI or AMX they are several times as fast; without, torch's loop for them is up to a hundred times
    slower.
    """
    links = torch.ones(_BLOCK_ROWS, 256)
    numbers = links.to(torch.int8)
    seconds = {torch._int_mm: inf, torch.mm: inf}
    for _ in range(3):
        for product, matrix in ((torch._int_mm, numbers), (torch.mm, links)):
            start = time.perf_counter()
            product(matrix, matrix.t())
            seconds[product] = min(seconds[product], time.perf_counter() - start)
    return seconds[torch._int_mm] < seconds[torch.mm]

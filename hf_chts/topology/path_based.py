"""Cannistraci-Hebb link prediction on bipartite layers, path-based (L3p): one term for each path of length three.

For the missing link between output i and input j, every path i - b - a - j adds a term. The inputs b and outputs a on
those paths are the local community of the pair. A node's internal degree (di) counts its links inside the community,
its external degree (de) those to nodes that are neither in it nor i or j themselves (arXiv 2501.19107, App. B and C).

The b on a path are the inputs of i, and every output of j that has such an input is an a, so di(b) is the number of
outputs that b shares with j, and 1 + de(b) = degree(b) − di(b): the link of b to i, which is not external, stands for
the 1. Likewise for a with the inputs it shares with i. So the term of a path is a factor of the pair (b, j) times one
of the pair (a, i), and the paths need not be listed: for each output i, a matrix product adds over all its b and a
at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Above this many multiply-adds (links x out x in), half a minute on a core of 2023, the node-based scores are the ones
# to use: they grow with out x in x (out + in)
_LARGEST_COST = 2**38
# Above this many nodes a side, the matrix of their common neighbours takes more than 2 GiB
_LARGEST_SIDE = 2**14

# factor of a node on the path (links inside the community, 1 + links that leave it)
_Factor = Callable[[Tensor, Tensor], Tensor]


def ch2_l3p(mask: Tensor) -> Tensor:
    """CH2-L3p scores: the sum of √((1 + di₁)(1 + di₂) / ((1 + de₁)(1 + de₂))) over the paths of length three.

    Exact and in double precision, for small layers: costs up to links·out·in multiply-adds, where `ch2_l3n` takes
    out·in·(out + in).

    Args:
        mask: bool (out, in).

    Returns:
        float64 (out, in), 0 on the links and where no path of length three leads.

    Raises:
        ValueError: links·out·in is above 2^38, or a side has more than 2^14 nodes.
    """
    return _path_based(mask, lambda internal, external: ((internal + 1) / external).sqrt_(), "ch2_l3n")


def ch3_l3p(mask: Tensor) -> Tensor:
    """CH3-L3p scores: the sum of 1/√((1 + de₁)(1 + de₂)) over the paths of length three; otherwise as `ch2_l3p`.

    bool (out, in) → float64 (out, in); the same errors.
    """
    return _path_based(mask, lambda internal, external: external.rsqrt(), "ch3_l3n")


def check_mask(mask: Tensor) -> None:
    """Raises ValueError where `mask` is not bool (out, in)."""
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise ValueError(
            f"a mask is a bool tensor (out, in); got {mask.dtype} {tuple(mask.shape)}: pass layer.mask or weight != 0"
        )


def _path_based(mask: Tensor, factor: _Factor, node_based: str) -> Tensor:
    check_mask(mask)
    outs, ins = mask.shape
    count = int(torch.count_nonzero(mask))
    cost = count * outs * ins
    if cost > _LARGEST_COST or max(outs, ins) > _LARGEST_SIDE:
        raise ValueError(
            f"the path-based scores of a layer of {outs} x {ins} with {count} links take {cost:.2g} multiply-adds and "
            f"matrices of {max(outs, ins)} x {max(outs, ins)}; they are for layers of up to {_LARGEST_COST:.2g} and "
            f"{_LARGEST_SIDE} nodes a side: use the node-based {node_based}"
        )

    links = mask.to(torch.float64)
    by_output = _factors(links, factor)  # (i, a): of output a on paths from output i
    by_input = _factors(links.t(), factor).t().contiguous()  # (b, j): of input b on paths to input j
    scores = torch.zeros_like(links)
    for i in range(outs):
        b = mask[i].nonzero().squeeze(1)  # (degree,)
        a = mask[:, b].any(1).nonzero().squeeze(1)  # outputs that share an input with i
        # of each (a, j), the sum over the inputs b that i and a share of the factor of (b, j)
        through = links[a[:, None], b] @ by_input[b]  # (a, in)
        scores[i] = by_output[i, a] @ through.mul_(links[a])
    # i itself was among the a, but only on paths to its own inputs, which are not missing links
    return scores.masked_fill_(mask, 0)


def _factors(links: Tensor, factor: _Factor) -> Tensor:
    """The factors of all pairs of nodes of the rows: entry (i, a) is that of node a on paths from the seed i."""
    common = links @ links.t()
    # 0 where all neighbours of a are neighbours of i: then a leads to no missing link of i, and needs no factor
    external = (links.sum(1) - common).clamp_(min=1)
    return factor(common, external)

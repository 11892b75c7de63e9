"""Bipartite scale-free (BSF): a Barabási-Albert network made bipartite, hubs included."""

import math

import torch
from torch import Tensor

from hf_chts.topology.allocation import apportion, check_links
from hf_chts.topology.parts import register


@register.initial_topology(
    "bipartite_scale_free", options={"equal_partition": "bsf_equal_partition", "resort": "bsf_resort"}
)
def bipartite_scale_free(
    out_features: int,
    in_features: int,
    links: int,
    *,
    equal_partition: bool = False,
    resort: bool = False,
    generator: torch.Generator,
) -> Tensor:
    """BSF: links drawn at random with the degrees of a Barabási-Albert network (arXiv 2501.19107, App. D and E).

    A Barabási-Albert network is grown on out + in nodes with about as many links as the layer, and its nodes are dealt
    to the two sides at random. The paper then rewires the links inside a side so that they join the sides and all nodes
    keep their degrees. Here only the degrees are kept: those of each side are scaled to add up to `links` (they do not
    by themselves, least of all if the sides differ in size) and cut off at the size of the other side, with the excess
    shared among the others; then a network with exactly these degrees is drawn at random. A dense or tiny layer may
    have no such network; then some nodes of the larger side get a few links more or fewer. Above half density the
    cut-off leaves little of the heavy tail.

    Args:
        equal_partition: give every input the same degree (to within one link); for a layer that sees raw input, where
            no feature should be a hub by chance.
        resort: order the nodes of both sides by degree, the largest first, so that the hubs among one layer's outputs
            meet those among the next one's inputs.

    Returns:
        bool (out, in) with exactly `links` links, on the generator's device.

    Raises:
        ValueError: a size or `links` is out of range.
    """
    total = check_links(out_features, in_features, links)
    degrees = _barabasi_albert_degrees(out_features + in_features, total, generator)
    order = torch.randperm(len(degrees), generator=generator, device=degrees.device)
    outs = apportion(degrees[order[:out_features]], total, in_features)
    ins = degrees[order[out_features:]]
    ins = apportion(torch.ones_like(ins) if equal_partition else ins, total, out_features)
    if resort:
        outs, ins = outs.sort(descending=True).values, ins.sort(descending=True).values
    elif equal_partition:
        # else the first inputs would have one link more
        ins = ins[torch.randperm(in_features, generator=generator, device=ins.device)]
    if out_features <= in_features:
        return _connect(outs, ins, generator)
    return _connect(ins, outs, generator).t().contiguous()


def _barabasi_albert_degrees(nodes: int, links: int, generator: torch.Generator) -> Tensor:
    """Degrees, oldest node first, of a Barabási-Albert network that grows from a star of k + 1 nodes by k links for
    each new node; k is chosen to come nearest to `links` links in all.

    Returns:
        int64 (nodes,), at least 1 each, 2·k·(nodes − k) in all.
    """
    # k + k·(nodes − k − 1) links; `links` is at most nodes²/4
    k = max(1, round((nodes - math.sqrt(nodes**2 - 4 * links)) / 2))
    degrees = torch.zeros(nodes, dtype=torch.float64, device=generator.device)
    degrees[0], degrees[1 : k + 1] = k, 1
    for node in range(k + 1, nodes):
        degrees[_draw(degrees[:node].log(), k, generator)] += 1
        degrees[node] = k
    return degrees.to(torch.int64)


def _connect(rows: Tensor, columns: Tensor, generator: torch.Generator) -> Tensor:
    """A random bool matrix with row sums `rows` and column sums `columns`; if none exists, some columns get a few links
    more or fewer.

    Sequential sampling after Chen, Diaconis, Holmes and Liu (JASA 100, 2005): each row, the largest first, draws its
    columns without replacement, in proportion to the odds (open links of a column) / (rows left that it can skip).
    """
    by_size, order = rows.sort(descending=True)
    mask = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=rows.device)
    open_links = columns.to(torch.float64)
    sums = by_size.cumsum(0)
    if not _can_be_connected(sums, open_links):
        open_links -= _unplaced(by_size, open_links)
    for done, (row, degree) in enumerate(zip(order.tolist(), by_size.tolist(), strict=True)):
        # log 0 = −inf excludes a finished column; division by 0 gives +inf to a column that needs all rows left
        odds = open_links / (len(rows) - done - open_links)
        chosen = _draw(odds.log(), degree, generator)
        left = open_links.clone()
        left[chosen] -= 1
        if not _can_be_connected(sums[done + 1 :] - sums[done], left):
            chosen = _fullest(open_links, degree)
            left = open_links.clone()
            left[chosen] -= 1
        mask[row, chosen] = True
        open_links = left
    return mask


def _fullest(open_links: Tensor, degree: int) -> Tensor:
    """The columns with most open links: never a dead end if there is a solution (Ryser)."""
    return open_links.argsort(descending=True, stable=True)[:degree]


def _unplaced(by_size: Tensor, columns: Tensor) -> Tensor:
    """Links that stay open (below 0: too many) in each column after all rows took the fullest columns."""
    left = columns.clone()
    for degree in by_size.tolist():
        left[_fullest(left, degree)] -= 1
    return left


def _can_be_connected(sums: Tensor, columns: Tensor) -> bool:
    """Gale and Ryser's condition: for all k, the sum of the k largest rows, `sums[k - 1]`, is at most
    Σ min(column, k)."""
    counts = torch.bincount(columns.to(torch.int64), minlength=len(sums) + 1)
    or_more = counts.flip(0).cumsum(0).flip(0)[1 : len(sums) + 1]  # columns of degree 1, 2, … or more
    return bool((sums <= or_more.cumsum(0)).all())


def _draw(log_weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k distinct indices, drawn one after another in proportion to the weights; +inf comes first, −inf last."""
    uniform = torch.rand(log_weights.shape, dtype=torch.float64, device=log_weights.device, generator=generator)
    return (log_weights - uniform.neg_().log1p_().neg_().log_()).topk(k, sorted=False).indices

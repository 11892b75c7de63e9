"""Percolation: remove the links of neurons that cannot pass a signal on, until nothing changes.

A *junction* is a set of neurons between layers: each is a row of the masks of the layers that produce it, and a column
of the masks of those that read it. A link is useful only while the neuron at its end is active, and removing links can
leave other neurons inactive, so all junctions are checked again until nothing changes. The order does not matter.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# The dimension of a mask (out, in) along which the nodes of a side lie
_DIMENSION = {"output": 0, "input": 1}


@dataclass(frozen=True, eq=False)
class End:
    """Where the paths of a junction touch one side of one layer.

    Attributes:
        layer: name of the layer.
        side: "output", the rows of its mask, or "input", the columns.
        nodes: int64 (paths, width) on the CPU; path p passes here while any of the nodes nodes[p] has a link.
        together: runs of this many nodes, from node 0 on, are inactive only together. For outputs that are normalised
            together, where each scales the others.
        constant: an output without links is not 0 (a bias, an activation with f(0) ≠ 0), so every path passes here.
    """

    layer: str
    side: str
    nodes: Tensor
    together: int = 1
    constant: bool = False


@dataclass(frozen=True, eq=False)
class Junction:
    """Paths that need all of their ends: a product, as in silu(gate)·up read by down.

    A node is active while a path through it is complete, in *any* junction: several readers of a neuron, or several
    summands that make it up, are a junction each. Percolation ignores nodes that are in no junction.

    Attributes:
        ends: two or more, with the same number of paths.
    """

    ends: tuple[End, ...]

    @property
    def layers(self) -> list[str]:
        """The names of the layers that meet here, each once."""
        return list(dict.fromkeys(end.layer for end in self.ends))


def gated_mlp(gate: str, up: str, down: str, *, neurons: int, constant: Collection[str] = ()) -> Junction:
    """Neuron i is act(gate_i)·up_i, read by column i of down, and inactive without any of the three.

    Args:
        gate, up, down: names of the layers.
        neurons: out_features of gate and up, in_features of down.
        constant: which of `gate` and `up` have outputs other than 0 without links (a bias; act(0) ≠ 0).
    """
    each = torch.arange(neurons)[:, None]
    return Junction(
        (
            End(gate, "output", each, constant=gate in constant),
            End(up, "output", each, constant=up in constant),
            End(down, "input", each),
        )
    )


def value_output(
    value: str, output: str, *, heads: int, kv_heads: int, head_dim: int, constant: Collection[str] = ()
) -> Junction:
    """Row (kv head h, dim t) of v is read by column (head g, dim t) of o for every head g of the group of h.

    A column needs its row, a row any one of its columns.

    Args:
        value, output: names of the layers.
        heads, kv_heads: query heads and key-value heads; the same without grouped-query attention.
        head_dim: features per head.
        constant: contains `value` if v has a bias, which o reads even from a row without links.

    Raises:
        ValueError: `heads` is not a multiple of `kv_heads`.
    """
    columns = torch.arange(heads * head_dim)[:, None]
    rows = _kv_head(columns // head_dim, heads, kv_heads) * head_dim + columns % head_dim
    return Junction((End(value, "output", rows, constant=value in constant), End(output, "input", columns)))


def query_key(
    query: str,
    key: str,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int | None = None,
    normalized: bool = False,
    constant: Collection[str] = (),
) -> Junction:
    """An attention logit is a sum over positions t of the head of q_t·k_t, and RoPE mixes t and t + rotary_dim/2.

    Under RoPE such a pair adds to the logit while either of its rows of q and either of its rows of k has a link.
    A pair of q needs that of its kv head's k, a pair of k that of any head in its group.

    Args:
        query, key: names of the layers.
        heads, kv_heads: query heads and key-value heads; the same without grouped-query attention.
        head_dim: features per head.
        rotary_dim: how many features at the start of a head RoPE rotates, in halves; the others meet one by one. None:
            the whole head.
        normalized: q and k are normalised per head (RMSNorm) before they meet. Then a pair that adds nothing itself
            still scales the others, so that the rows of a head are inactive only together.
        constant: which of `query` and `key` have a bias.

    Raises:
        ValueError: `heads` is not a multiple of `kv_heads`, or `rotary_dim` is odd or not in [0, head_dim].
    """
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
        raise ValueError(f"rotary_dim is {rotary_dim}; RoPE takes an even number of the {head_dim} features of a head")
    first = torch.arange(rotary_dim // 2)
    alone = torch.arange(rotary_dim, head_dim)
    pairs = torch.cat([torch.stack([first, first + rotary_dim // 2], 1), torch.stack([alone, alone], 1)])
    head = torch.arange(heads)[:, None, None]
    together = head_dim if normalized else 1
    queries = (head * head_dim + pairs).flatten(0, 1)
    keys = (_kv_head(head, heads, kv_heads) * head_dim + pairs).flatten(0, 1)
    return Junction(
        (
            End(query, "output", queries, together, query in constant),
            End(key, "output", keys, together, key in constant),
        )
    )


def percolate(
    masks: Mapping[str, Tensor], junctions: Iterable[Junction], fixed: Collection[str] = ()
) -> dict[str, Tensor]:
    """Remove every link of every inactive neuron, until nothing changes.

    Args:
        masks: bool (out, in) by layer name, those of a junction on one device; read only.
        junctions: where the layers meet. Layers without a mask are dense, and always active.
        fixed: layers that keep all their links; their nodes without links make others inactive all the same.

    Returns:
        New masks under the same names, with a subset of the links.

    Raises:
        ValueError: a layer does not have the nodes that a junction names.
    """
    junctions = [junction for junction in junctions if not masks.keys().isdisjoint(junction.layers)]
    _check(masks, junctions)
    masks = {name: mask.clone() for name, mask in masks.items()}
    wiring = [_on_device_of(masks, junction) for junction in junctions]
    sides = {(end.layer, end.side) for junction in junctions for end in junction.ends if end.layer in masks}
    changed = True
    while changed:
        changed = False
        linked = {(layer, side): _linked(masks[layer], side) for layer, side in sides}
        for (layer, side), active in _active(linked, wiring).items():
            if layer in fixed:
                continue
            useless = (linked[layer, side] & ~active).nonzero().squeeze(1)
            if useless.numel():
                masks[layer].index_fill_(_DIMENSION[side], useless, False)
                changed = True
    return masks


def coupled_groups(junctions: Iterable[Junction], layers: Iterable[str]) -> list[list[str]]:
    """Groups of layers that must percolate together: they meet in a junction, directly or through others.

    Args:
        junctions: where the layers meet.
        layers: names of the masked layers, in the model's order. Other layers in a junction are dense, and connect
            nothing.

    Returns:
        Each of `layers` in exactly one group, in the given order, groups by their first layer.
    """
    group = {layer: [layer] for layer in layers}
    place = {layer: index for index, layer in enumerate(group)}
    for junction in junctions:
        members = {layer for met in junction.layers if met in group for layer in group[met]}
        merged = sorted(members, key=place.__getitem__)
        for layer in merged:
            group[layer] = merged
    return [members for layer, members in group.items() if members[0] == layer]


def anp_rate(masks: Mapping[str, Tensor], junctions: Iterable[Junction] = ()) -> float:
    """Active neurons post percolation: the share of all layers' nodes that have a link after percolation.

    Without junctions, the share before it. After arXiv 2501.19107, App. G; nodes are the outputs and inputs of
    each layer.

    Args:
        masks: bool (out, in) by layer name, at least one; read only.
        junctions: as in `percolate`.
    """
    nodes = sum(sum(mask.shape) for mask in masks.values())
    return sum(active_neurons(mask) for mask in percolate(masks, junctions).values()) / nodes


def active_neurons(mask: Tensor) -> int:
    """The number of a layer's output and input nodes that have a link; bool (out, in)."""
    return sum(int(torch.count_nonzero(_linked(mask, side))) for side in _DIMENSION)


def active_neurons_of_each(masks: Tensor) -> Tensor:
    """`active_neurons` of each layer of a stack: bool (layers, out, in) → int64 (layers,)."""
    linked = [masks.view(torch.uint8).amax(dimension) for dimension in (1, 2)]
    return torch.cat(linked, 1).sum(1, dtype=torch.int64)


def _active(linked: Mapping[tuple[str, str], Tensor], wiring: Sequence[Junction]) -> dict[tuple[str, str], Tensor]:
    """Which nodes of each side are on a complete path; bool (nodes,). Nodes without a junction are active."""
    active = {side: torch.ones_like(nodes) for side, nodes in linked.items()}
    ends = [(junction, end) for junction in wiring for end in junction.ends if (end.layer, end.side) in active]
    for _, end in ends:
        _runs(active[end.layer, end.side], end)[end.nodes // end.together] = False
    for junction, end in ends:
        whole = _whole(linked, junction)
        _runs(active[end.layer, end.side], end)[end.nodes[whole] // end.together] = True
    return active


def _whole(linked: Mapping[tuple[str, str], Tensor], junction: Junction) -> Tensor:
    """Which paths have a link at every end, bool (paths,)."""
    passes = [
        linked[end.layer, end.side][end.nodes].any(1)
        for end in junction.ends
        if not end.constant and (end.layer, end.side) in linked
    ]
    first = junction.ends[0].nodes
    return torch.stack(passes).all(0) if passes else first.new_ones(first.shape[0], dtype=torch.bool)


def _runs(nodes: Tensor, end: End) -> Tensor:
    return nodes.view(-1, end.together)


def _linked(mask: Tensor, side: str) -> Tensor:
    # as bytes: an order of magnitude faster than mask.any(dim) on CPUs
    return mask.view(torch.uint8).amax(1 - _DIMENSION[side]).view(torch.bool)


def _kv_head(head: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The key-value head that each query head reads."""
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key-value heads evenly")
    return head // (heads // kv_heads)


def _on_device_of(masks: Mapping[str, Tensor], junction: Junction) -> Junction:
    device = next(masks[layer].device for layer in junction.layers if layer in masks)
    return Junction(tuple(replace(end, nodes=end.nodes.to(device)) for end in junction.ends))


def _check(masks: Mapping[str, Tensor], junctions: Iterable[Junction]) -> None:
    for end in (end for junction in junctions for end in junction.ends if end.layer in masks):
        size = masks[end.layer].shape[_DIMENSION[end.side]]
        if int(end.nodes.max()) >= size or size % end.together:
            raise ValueError(
                f"a junction has node {int(end.nodes.max())} of {end.layer}'s {end.side} in runs of {end.together}, "
                f"but that side has {size} nodes: make the junction with the layer's sizes"
            )

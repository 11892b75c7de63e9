"""Percolation on networks drawn and worked out by hand, and against loops over neurons."""

import pytest
import torch

from hf_chts.topology.percolation import (
    End,
    Junction,
    anp_rate,
    coupled_groups,
    gated_mlp,
    percolate,
    query_key,
    value_output,
)
from hf_chts.topology.random_streams import random_stream


def network(out_features, in_features, links):
    """bool (out, in) from {output: its inputs}."""
    mask = torch.zeros(out_features, in_features, dtype=torch.bool)
    for node, inputs in links.items():
        mask[node, list(inputs)] = True
    return mask


def same(masks, expected):
    return masks.keys() == expected.keys() and all(masks[name].equal(expected[name]) for name in masks)


def each(nodes):
    return torch.arange(nodes)[:, None]


# Two gated MLPs, one after the other, with no residual stream between them:
#
#   x0 x1 → (gate, up) → A0 A1 A2 → (down) → y0 y1 y2 → (gate', up') → B0 B1 B2 → (down') → z0 z1
#
# A0 has nothing in up: it is inactive, so its links in gate and to y0, y1 go; y0 had only A0, so its readers B0 and B1
# lose it; up' of B0 read only y0, so B0's link in gate' and to z0 go.
# Nobody reads B2: its links to y2 go; nobody reads y2 then: its link to A2 goes; nobody reads A2 then: its links go.
CHAIN = {
    "gate": network(3, 2, {0: (0, 1), 1: (1,), 2: (0, 1)}),
    "up": network(3, 2, {1: (0, 1), 2: (0,)}),
    "down": network(3, 3, {0: (0,), 1: (0, 1), 2: (2,)}),
    "gate'": network(3, 3, {0: (0, 1), 1: (0, 1), 2: (2,)}),
    "up'": network(3, 3, {0: (0,), 1: (1,), 2: (2,)}),
    "down'": network(2, 3, {0: (0, 1), 1: (1,)}),
}
CHAIN_LEFT = {
    "gate": network(3, 2, {1: (1,)}),
    "up": network(3, 2, {1: (0, 1)}),
    "down": network(3, 3, {1: (1,)}),
    "gate'": network(3, 3, {1: (1,)}),
    "up'": network(3, 3, {1: (1,)}),
    "down'": network(2, 3, {0: (1,), 1: (1,)}),
}


def chain_junctions():
    return [
        gated_mlp("gate", "up", "down", neurons=3),
        # y is read by two layers, and either will do
        Junction((End("down", "output", each(3)), End("gate'", "input", each(3)))),
        Junction((End("down", "output", each(3)), End("up'", "input", each(3)))),
        gated_mlp("gate'", "up'", "down'", neurons=3),
    ]


@pytest.mark.parametrize("order", [1, -1])
def test_a_cascade_runs_both_ways_through_the_chain(order):
    before = {name: mask.clone() for name, mask in CHAIN.items()}
    left = percolate(CHAIN, chain_junctions()[::order])
    assert same(left, CHAIN_LEFT)
    assert same(CHAIN, before)
    assert same(percolate(left, chain_junctions()), CHAIN_LEFT)


def test_one_reader_of_two_is_enough():
    # y0 is read by up' alone, y1 by gate' alone, y2 by neither
    masks = {
        "down": torch.ones(3, 2, dtype=torch.bool),
        "gate'": network(2, 3, {0: (1,)}),
        "up'": network(2, 3, {1: (0,)}),
    }
    left = percolate(masks, chain_junctions()[1:3])
    assert same(left, {**masks, "down": network(3, 2, {0: (0, 1), 1: (0, 1)})})


def test_active_neurons_before_and_after():
    # linked outputs + inputs, layer by layer; in all 33 nodes
    assert anp_rate(CHAIN) == (3 + 2 + 2 + 2 + 3 + 3 + 3 + 3 + 3 + 3 + 2 + 2) / 33
    assert anp_rate(CHAIN, chain_junctions()) == (1 + 1 + 1 + 2 + 1 + 1 + 1 + 1 + 1 + 1 + 2 + 1) / 33


@pytest.mark.parametrize("missing", ["gate", "up", "down"])
def test_a_gated_neuron_needs_gate_up_and_a_reader(missing):
    full = {name: torch.ones(2, 2, dtype=torch.bool) for name in ("gate", "up", "down")}
    if missing == "down":
        full["down"][:, 1] = False
    else:
        full[missing][1] = False
    rows, columns = network(2, 2, {0: (0, 1)}), network(2, 2, {0: (0,), 1: (0,)})
    left = percolate(full, [gated_mlp("gate", "up", "down", neurons=2)])
    assert same(left, {"gate": rows, "up": rows, "down": columns})


def test_a_bias_keeps_readers_but_not_the_unread():
    masks = {"gate": network(3, 2, {0: (0,), 2: (0,)}), "up": network(3, 2, {1: (1,), 2: (0, 1)})}
    masks["down"] = network(2, 3, {0: (0, 1), 1: (1,)})
    # gate has a bias, so neuron 1, with no link in it, is up_1 times a constant; neuron 0 has nothing in up; nobody
    # reads neuron 2
    left = percolate(masks, [gated_mlp("gate", "up", "down", neurons=3, constant=["gate"])])
    assert same(
        left, {"gate": network(3, 2, {}), "up": network(3, 2, {1: (1,)}), "down": network(2, 3, {0: (1,), 1: (1,)})}
    )


# v with 2 kv heads of 2 features; o reads 4 heads: columns 0, 1 | 2, 3 of kv head 0 and 4, 5 | 6, 7 of kv head 1
#   v row 0 (head 0, t 0)  read by columns 0, 2: column 2 has links, and that is enough
#   v row 1 (head 0, t 1)  empty: columns 1 and 3 go
#   v row 2 (head 1, t 0)  read by columns 4, 6, both empty: it goes
#   v row 3 (head 1, t 1)  read by columns 5, 7: all stay
def test_values_and_outputs_under_grouped_query_attention():
    masks = {
        "v": network(4, 3, {0: (0,), 2: (0, 2), 3: (1, 2)}),
        "o": network(2, 8, {0: (1, 2, 3, 5), 1: (3, 5, 7)}),
    }
    junction = value_output("v", "o", heads=4, kv_heads=2, head_dim=2)
    left = percolate(masks, [junction])
    assert same(left, {"v": network(4, 3, {0: (0,), 3: (1, 2)}), "o": network(2, 8, {0: (2, 5), 1: (5, 7)})})
    biased = value_output("v", "o", heads=4, kv_heads=2, head_dim=2, constant=["v"])
    assert same(percolate(masks, [biased]), {"v": left["v"], "o": masks["o"]})


# q of 4 heads and k of 2, head_dim 4. RoPE pairs features 0, 2 and 1, 3 of a head. Rows that have links:
#            pair 0          pair 1
#   q head 0   0              1  3
#   q head 1                  5
#   k head 0      2
#   q head 2
#   q head 3                 13
#   k head 1   4  6           5  7
Q_ROWS, K_ROWS = [0, 1, 3, 5, 13], [2, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("options", "queries", "keys"),
    [
        # pair 0 of head 0 meets across the pair. k head 0 has no pair 1: q rows 1, 3, 5 go. Of pair 0 of k head 1,
        # heads 2 and 3 have nothing: k rows 4, 6 go. Its pair 1 meets that of head 3.
        ({}, [0, 13], [2, 5, 7]),
        # no RoPE: feature by feature only 13 (head 3, t 1) meets 5 (k head 1, t 1)
        ({"rotary_dim": 0}, [13], [5]),
        # RoPE on features 0 and 1 of a head, its one pair: q rows 0, 1, 5 find no k row 0, 1; 13 finds 4 and 5.
        # Features 2 and 3 meet alone: q row 3 finds no k row 3; k rows 2, 6, 7 find no q row
        ({"rotary_dim": 2}, [13], [4, 5]),
        # normalised: heads 0 and 3 meet k somewhere, so all their rows matter, and those of their k heads. Head 1 meets
        # nothing: 5 goes
        ({"normalized": True}, [0, 1, 3, 13], [2, 4, 6, 5, 7]),
        # k has a bias: no q is cut off; the k rows without any q go as before
        ({"constant": ["k"]}, Q_ROWS, [2, 5, 7]),
        # q has a bias: k is read everywhere
        ({"constant": ["q"]}, [0, 13], K_ROWS),
    ],
)
def test_queries_and_keys_in_pairs_and_groups(options, queries, keys):
    def masks(queries, keys):
        return {
            "q": network(16, 3, {row: (row % 3, 2) for row in queries}),
            "k": network(8, 3, {row: (row % 3, 0) for row in keys}),
        }

    junction = query_key("q", "k", heads=4, kv_heads=2, head_dim=4, **options)
    assert same(percolate(masks(Q_ROWS, K_ROWS), [junction]), masks(queries, keys))


class Slow:
    """Neuron by neuron, link by link: layers as sets of (output, input), and the rules as loops over neurons."""

    def __init__(self, masks, dense, constant):
        self.links = {name: {tuple(link) for link in mask.nonzero().tolist()} for name, mask in masks.items()}
        self.dense, self.constant = dense, constant

    def makes(self, layer, row):
        """Whether an output is anything but 0."""
        return layer in self.dense or layer in self.constant or any(out == row for out, _ in self.links[layer])

    def reads(self, layer, column):
        return layer in self.dense or any(into == column for _, into in self.links[layer])

    def clear_row(self, layer, row):
        self.links[layer] = {link for link in self.links[layer] if link[0] != row}

    def clear_column(self, layer, column):
        self.links[layer] = {link for link in self.links[layer] if link[1] != column}

    def until_nothing_changes(self, sweep):
        while True:
            before = {name: set(links) for name, links in self.links.items()}
            sweep()
            if before == self.links:
                return

    def gated(self, gate, up, down, neurons):
        for i in range(neurons):
            if not (self.makes(gate, i) and self.makes(up, i) and self.reads(down, i)):
                self.clear_row(gate, i)
                self.clear_row(up, i)
                self.clear_column(down, i)

    def chain(self):
        self.gated("gate", "up", "down", 5)
        for i in range(4):
            if not self.makes("down", i):
                self.clear_column("gate'", i)
                self.clear_column("up'", i)
            if not (self.reads("gate'", i) or self.reads("up'", i)):
                self.clear_row("down", i)
        self.gated("gate'", "up'", "down'", 5)

    def values(self, heads, kv_heads, head_dim):
        group = heads // kv_heads
        for h in range(kv_heads):
            for t in range(head_dim):
                row = h * head_dim + t
                columns = [g * head_dim + t for g in range(h * group, (h + 1) * group)]
                if not any(self.reads("o", column) for column in columns):
                    self.clear_row("v", row)
                if not self.makes("v", row):
                    for column in columns:
                        self.clear_column("o", column)

    def queries(self, heads, kv_heads, head_dim, rotary_dim, normalized):
        half, group = rotary_dim // 2, heads // kv_heads
        pairs = [(t, t + half) for t in range(half)] + [(t,) for t in range(rotary_dim, head_dim)]
        for h in range(kv_heads):
            mine = range(h * group, (h + 1) * group)
            meets = {}
            for g in mine:
                for pair in pairs:
                    q = any(self.makes("q", g * head_dim + t) for t in pair)
                    k = any(self.makes("k", h * head_dim + t) for t in pair)
                    meets[g, pair] = q and k
            for g in mine:
                for pair in pairs:
                    if not (any(meets[g, p] for p in pairs) if normalized else meets[g, pair]):
                        for t in pair:
                            self.clear_row("q", g * head_dim + t)
            for pair in pairs:
                if not any(meets[g, p] for g in mine for p in (pairs if normalized else [pair])):
                    for t in pair:
                        self.clear_row("k", h * head_dim + t)


ATTENTION = [(4, 4, 4), (4, 2, 4), (6, 2, 2), (3, 1, 6)]
CASES = [
    *[("values", sizes, {}) for sizes in ATTENTION],
    *[
        ("queries", sizes, {"rotary_dim": sizes[2], "normalized": norm})
        for sizes in ATTENTION
        for norm in (False, True)
    ],
    ("queries", (4, 2, 4), {"rotary_dim": 2, "normalized": False}),
    ("queries", (4, 2, 3), {"rotary_dim": 0, "normalized": False}),
    ("chain", (), {}),
]


def case(kind, sizes, options, constant):
    if kind == "chain":
        shapes = {"gate": (5, 3), "up": (5, 3), "down": (4, 5), "gate'": (5, 4), "up'": (5, 4), "down'": (3, 5)}
        return shapes, [
            gated_mlp("gate", "up", "down", neurons=5, constant=constant),
            # a constant of down reaches both of its readers
            *[
                Junction((End("down", "output", each(4), constant="down" in constant), End(reader, "input", each(4))))
                for reader in ("gate'", "up'")
            ],
            gated_mlp("gate'", "up'", "down'", neurons=5, constant=constant),
        ]
    heads, kv_heads, head_dim = sizes
    named = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "constant": constant}
    if kind == "values":
        return {"v": (kv_heads * head_dim, 3), "o": (3, heads * head_dim)}, [value_output("v", "o", **named)]
    return {"q": (heads * head_dim, 3), "k": (kv_heads * head_dim, 3)}, [query_key("q", "k", **named, **options)]


@pytest.mark.parametrize(("kind", "sizes", "options"), CASES)
def test_random_networks_against_loops_over_neurons(kind, sizes, options):
    removed = 0
    for trial in range(40):
        generator = random_stream(trial, "percolation")
        names = list(case(kind, sizes, options, [])[0])
        constant = names[:2][trial % 4 : trial % 4 + 1]  # the first layer, the second, or neither
        dense = {names[trial % len(names)]} if trial % 3 == 0 else set()
        shapes, junctions = case(kind, sizes, options, constant)
        masks = {}
        for name, (outputs, inputs) in shapes.items():
            mask = torch.rand(outputs, inputs, generator=generator) < 0.4
            mask &= torch.rand(outputs, 1, generator=generator) < 0.7
            masks[name] = mask & (torch.rand(1, inputs, generator=generator) < 0.8)
        slow = Slow(masks, dense, constant)
        slow.until_nothing_changes(lambda slow=slow: getattr(slow, kind)(*sizes, **options))
        masked = {name: mask for name, mask in masks.items() if name not in dense}
        fast = percolate(masked, junctions)
        assert fast.keys() == masked.keys()
        for name, mask in fast.items():
            assert {tuple(link) for link in mask.nonzero().tolist()} == slow.links[name]
            assert not (mask & ~masks[name]).any()
        assert same(percolate(fast, junctions), fast)
        removed += sum(int(masks[name].sum() - mask.sum()) for name, mask in fast.items())
    assert removed > 0


@pytest.mark.parametrize(("kind", "sizes", "options"), CASES)
def test_a_network_of_active_neurons_is_left_alone(kind, sizes, options):
    shapes, junctions = case(kind, sizes, options, [])
    masks = {}
    for name, (outputs, inputs) in shapes.items():
        # one link for every output, and one for every input
        links = torch.arange(max(outputs, inputs))
        masks[name] = network(outputs, inputs, {})
        masks[name][links % outputs, links % inputs] = True
    left = percolate(masks, junctions)
    assert same(left, masks)
    assert all(left[name] is not masks[name] for name in masks)
    left[next(iter(left))].fill_(False)
    assert masks[next(iter(masks))].any()


def test_any_layout_in_memory():
    transposed = {name: mask.t().contiguous().t() for name, mask in CHAIN.items()}
    assert same(percolate(transposed, chain_junctions()), CHAIN_LEFT)


def test_nodes_without_a_junction_are_left_alone():
    # the reader's columns 2 and 3 come from elsewhere
    masks = {"first": network(2, 2, {1: (0,)}), "reader": torch.ones(1, 4, dtype=torch.bool)}
    half = Junction((End("first", "output", each(2)), End("reader", "input", each(2))))
    assert percolate(masks, [half])["reader"].tolist() == [[False, True, True, True]]


def test_coupled_groups():
    layers = ["embed", "q", "k", "v", "o", "gate", "up", "down", "head"]
    junctions = [
        gated_mlp("gate", "up", "down", neurons=2),
        value_output("v", "o", heads=2, kv_heads=1, head_dim=2),
        query_key("q", "k", heads=2, kv_heads=1, head_dim=2),
    ]
    groups = [["embed"], ["q", "k"], ["v", "o"], ["gate", "up", "down"], ["head"]]
    assert coupled_groups(junctions, layers) == groups
    assert coupled_groups(junctions, layers[::-1]) == [group[::-1] for group in groups[::-1]]
    assert coupled_groups([], ["b", "a"]) == [["b"], ["a"]]
    # through others, but not through a dense layer
    assert coupled_groups(chain_junctions(), list(CHAIN)) == [list(CHAIN)]
    without = [name for name in CHAIN if name != "down"]
    assert coupled_groups(chain_junctions(), without) == [["gate", "up"], ["gate'", "up'", "down'"]]


def test_bad_input():
    junction = value_output("v", "o", heads=4, kv_heads=2, head_dim=2)
    v, o = torch.ones(4, 3, dtype=torch.bool), torch.ones(3, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"node 7 of o's input .* has 6 nodes"):
        percolate({"v": v, "o": o[:, :6]}, [junction])
    with pytest.raises(ValueError, match=r"of q's output in runs of 4, .* has 6 nodes"):
        percolate({"q": v.repeat(2, 1)[:6]}, [query_key("q", "k", heads=1, kv_heads=1, head_dim=4, normalized=True)])
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        value_output("v", "o", heads=3, kv_heads=2, head_dim=2)
    with pytest.raises(ValueError, match="rotary_dim is 3; RoPE takes an even number of the 4"):
        query_key("q", "k", heads=1, kv_heads=1, head_dim=4, rotary_dim=3)

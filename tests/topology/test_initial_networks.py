"""Small-world, scale-free and correlated topologies: lattices and correlations by hand, degrees, exact links."""

import math

import pytest
import torch

from hf_chts.topology import scale_free
from hf_chts.topology.allocation import links_at
from hf_chts.topology.initial import bipartite_scale_free, bipartite_small_world, correlated, erdos_renyi
from hf_chts.topology.random_streams import random_stream

SHAPES = [(64, 64), (30, 150), (150, 30), (7, 3), (1, 9), (9, 1)]
SPARSITIES = [0.0, 0.1, 0.5, 0.83, 0.95]


def small_world(shape, sparsity, *, key=0, **options):
    return bipartite_small_world(*shape, links_at(math.prod(shape), sparsity), generator=random_stream(key), **options)


def scale_free_network(shape, sparsity, *, key=0, **options):
    return bipartite_scale_free(*shape, links_at(math.prod(shape), sparsity), generator=random_stream(key), **options)


def csti(inputs, outs, sparsity, *, key=0):
    return correlated(inputs, outs, links_at(outs * inputs.shape[-1], sparsity), generator=random_stream(key))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_exact_number_of_links(shape, sparsity):
    links = round(shape[0] * shape[1] * (1 - sparsity))
    inputs = torch.randn(5, shape[1], generator=random_stream(1))
    networks = [small_world(shape, sparsity, beta=beta) for beta in (0, 0.25, 1)]
    networks += [scale_free_network(shape, sparsity, equal_partition=e, resort=r) for e in (0, 1) for r in (0, 1)]
    networks += [csti(inputs, shape[0], sparsity)]
    for mask in networks:
        assert mask.dtype == torch.bool
        assert tuple(mask.shape) == shape
        assert int(mask.sum()) == links


# Bipartite small world


def test_lattice_by_hand():
    # output i sits at 2i among 8 inputs and has the 3 nearest
    expected = torch.zeros(4, 8, dtype=torch.bool)
    for i, inputs in enumerate([(7, 0, 1), (1, 2, 3), (3, 4, 5), (5, 6, 7)]):
        expected[i, list(inputs)] = True
    assert small_world((4, 8), 1 - 12 / 32, beta=0).equal(expected)
    # of two at distance 1 the lower; outputs at 0, 1.5, 3, 4.5, the last two with the links left over from 6/4
    expected = torch.zeros(4, 6, dtype=torch.bool)
    for i, inputs in enumerate([(0,), (1, 2), (3,), (4, 5)]):
        expected[i, list(inputs)] = True
    assert small_world((4, 6), 1 - 6 / 24, beta=0).equal(expected)
    assert small_world((2, 4), 0.5, beta=0).nonzero().tolist() == [[0, 0], [0, 3], [1, 1], [1, 2]]


@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("sparsity", SPARSITIES[1:])
def test_lattice_takes_the_nearest_inputs(shape, sparsity):
    outs, ins = shape
    mask = small_world(shape, sparsity, beta=0)
    degrees = mask.sum(1)
    assert degrees.max() - degrees.min() <= 1
    for row in range(outs):
        # in units of 1/out, so that all are whole numbers
        away = (torch.arange(ins) * outs - row * ins).abs()
        distance = torch.minimum(away, ins * outs - away)
        taken, left = distance[mask[row]], distance[~mask[row]]
        if len(taken) and len(left):
            assert taken.max() <= left.min()


@pytest.mark.parametrize("beta", [0.1, 0.25, 0.6])
def test_a_share_beta_is_rewired_uniformly_and_output_degrees_stay(beta):
    shape, sparsity, runs = (60, 200), 0.9, 50
    lattice = small_world(shape, sparsity, beta=0)
    outside = torch.zeros(shape)
    moved = 0
    for key in range(runs):
        mask = small_world(shape, sparsity, beta=beta, key=key)
        assert mask.sum(1).equal(lattice.sum(1))
        outside += mask & ~lattice
        moved += int((mask & ~lattice).sum())
    # round(β·1200) links leave, r of each output's 20; a return is drawn from 180 + r places, r of them in the lattice
    rewired = round(beta * 1200)
    per_row = 20 * beta
    expected = rewired * 180 / (180 + per_row)
    assert abs(moved / runs - expected) < 0.02 * rewired
    # all places off the lattice alike: by distance from the output's own place, 60 rows and 50 runs to a bin
    shifted = torch.stack([outside[i].roll(-round(i * 200 / 60)) for i in range(60)]).sum(0)[15:185]
    mean = shifted.mean()
    assert float(((shifted - mean) ** 2 / mean).sum()) < 170 + 5 * math.sqrt(2 * 170)


def squares(mask):
    """Pairs of outputs with two inputs in common, over pairs of outputs and inputs: how clustered a network is."""
    common = mask.double() @ mask.t().double()
    common.fill_diagonal_(0)
    return float((common * (common - 1)).sum())


def test_beta_1_is_near_erdos_renyi():
    shape, sparsity = (80, 80), 0.9
    # by place on the ring, every diagonal is as full as any other
    counts = sum(small_world(shape, sparsity, beta=1, key=key).double() for key in range(60))
    shifted = torch.stack([counts[i].roll(-i) for i in range(80)]).sum(0)
    assert float(((shifted - shifted.mean()) ** 2 / shifted.mean()).sum()) < 80 + 5 * math.sqrt(160)
    # two outputs with 8 random inputs of 80 each: 8·7·8·7/(80·79) ordered pairs in common, times 80·79 pairs of outputs
    mean = sum(squares(small_world(shape, sparsity, beta=1, key=key)) for key in range(20)) / 20
    assert mean == pytest.approx(3136, rel=0.05)
    # in the lattice, those at distance 1 to 6 on the ring have 7 to 2 in common: 7·6 + 6·5 + … + 2·1 = 112, both ways
    assert squares(small_world(shape, sparsity, beta=0)) == 80 * 2 * 112


def test_full_and_empty_rewiring():
    assert small_world((5, 5), 0.0, beta=1).all()
    assert not small_world((3, 4), 0.99, beta=1).any()


# Bipartite scale-free


def test_barabasi_albert_degrees_follow_their_law():
    """P(d) = 2k(k + 1)/(d(d + 1)(d + 2)) from d = k on, for k links to each new node."""
    k, nodes = 3, 4000
    counts = torch.zeros(nodes)
    for key in range(3):
        degrees = scale_free._barabasi_albert_degrees(nodes, k * (nodes - k), random_stream(key))
        assert int(degrees.sum()) == 2 * k * (nodes - k)
        assert int((degrees < k).sum()) <= k  # the first nodes, if no other came to them
        counts += torch.bincount(degrees, minlength=nodes)
    d = torch.arange(k, 15).double()
    law = 2 * k * (k + 1) / (d * (d + 1) * (d + 2))
    observed = counts[k:15].double() / counts.sum()
    assert torch.allclose(observed, law, rtol=0.2, atol=0)
    # and the tail beyond: Σ from D on is k(k + 1)/(D(D + 1))
    for start in (15, 30, 60):
        tail = float(counts[start:].sum() / counts.sum())
        assert tail == pytest.approx(k * (k + 1) / (start * (start + 1)), rel=0.3)


def gini(degrees):
    """0 where all degrees are equal, towards 1 where few nodes have all links."""
    ordered = degrees.double().sort().values
    n = len(ordered)
    return float((torch.arange(1, n + 1).double() * 2 - n - 1) @ ordered / (n * ordered.sum()))


@pytest.mark.parametrize("shape", [(400, 400), (200, 600), (600, 200)])
def test_both_sides_have_hubs_that_a_random_network_lacks(shape):
    mask, random = (
        scale_free_network(shape, 0.95),
        erdos_renyi(*shape, links_at(math.prod(shape), 0.95), generator=random_stream(0)),
    )
    for side in (0, 1):
        degrees, plain = mask.sum(side), random.sum(side)
        assert degrees.max() > 3.5 * degrees.double().mean()
        assert plain.max() < 2.5 * plain.double().mean()
        assert gini(degrees) > 1.5 * gini(plain)
        # k of a mean of 2k for the youngest, less what they lose as the sides are balanced; the median is √2·k
        assert degrees.min() > 0.4 * degrees.double().mean()
        assert degrees.double().median() < 0.8 * degrees.double().mean()


def test_degrees_are_those_that_were_grown(monkeypatch):
    """The rewiring to two sides keeps them: all degrees of the network before, in some order, where sides balance."""
    grown = torch.tensor([9, 8, 6, 5, 4, 4, 3, 3, 3, 3] * 2)
    monkeypatch.setattr(scale_free, "_barabasi_albert_degrees", lambda *_: grown)
    # pairs of equal nodes, one on each side
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
    mask = scale_free_network((10, 10), 1 - 48 / 100)
    assert mask.sum(1).tolist() == mask.sum(0).tolist() == grown[:10].tolist()
    # half as many links: half the degrees, to a link
    mask = scale_free_network((10, 10), 1 - 24 / 100)
    assert (mask.sum(0) - grown[:10] / 2).abs().max() < 1


@pytest.mark.parametrize("shape", [(60, 60), (30, 100), (100, 30)])
def test_equal_partition_evens_the_inputs_alone(shape):
    mask = scale_free_network(shape, 0.8, equal_partition=True)
    degrees = mask.sum(0)
    assert degrees.max() - degrees.min() <= 1
    # the same degrees of the outputs as without, which are drawn first
    assert mask.sum(1).equal(scale_free_network(shape, 0.8).sum(1))
    assert mask.sum(1).max() > 1.6 * mask.sum(1).double().mean()


@pytest.mark.parametrize("shape", [(60, 60), (30, 100), (100, 30)])
def test_resorting_orders_nodes_by_degree(shape):
    mask, plain = scale_free_network(shape, 0.8, resort=True), scale_free_network(shape, 0.8)
    for side in (0, 1):
        degrees = mask.sum(side)
        assert (degrees.diff() <= 0).all()
        assert not (plain.sum(side).diff() <= 0).all()
        assert degrees.equal(plain.sum(side).sort(descending=True).values)


def test_every_network_of_the_given_degrees_is_drawn():
    rows, columns = torch.tensor([1, 2, 1]), torch.tensor([2, 1, 1])
    seen = set()
    for key in range(200):
        mask = scale_free._connect(rows, columns, random_stream(key))
        assert mask.sum(1).equal(rows)
        assert mask.sum(0).equal(columns)
        seen.add(tuple(mask.flatten().tolist()))
    # hub joined to hub: 2 choices of the hub row's other column, times 2 of the hub column's other row; hub not joined
    # to hub: the hub row has both other columns, and the other rows the hub column
    assert len(seen) == 5


@pytest.mark.parametrize("key", range(5))
def test_degrees_are_exact_where_a_network_has_them(key):
    random = torch.rand(25, 40, generator=random_stream(key)) < torch.rand(40, generator=random_stream(key, "in"))
    random[:4] |= torch.rand(4, 40, generator=random_stream(key, "hubs")) < 0.8
    mask = scale_free._connect(random.sum(1), random.sum(0), random_stream(key))
    assert mask.sum(1).equal(random.sum(1))
    assert mask.sum(0).equal(random.sum(0))
    assert not mask.equal(random)


def test_a_draw_that_leads_to_a_dead_end_is_avoided():
    # the first row takes all columns, which leaves (3, 2, 2, 2, 1, 1) open for rows of 5, 5 and 1: the second must not
    # close both columns that have 1 left, or the third finds 4 open where it needs 5
    rows, columns = torch.tensor([6, 5, 5, 1]), torch.tensor([4, 3, 3, 3, 2, 2])
    for key in range(40):
        mask = scale_free._connect(rows, columns, random_stream(key))
        assert mask.sum(1).equal(rows)
        assert mask.sum(0).equal(columns)


def test_degrees_that_no_network_has_get_as_near_as_may_be():
    # two rows want 3 of 4 columns, but one column wants 3 links and there are but 2 rows
    mask = scale_free._connect(torch.tensor([3, 3]), torch.tensor([3, 1, 1, 1]), random_stream(0))
    assert mask.sum(1).tolist() == [3, 3]
    assert sorted(mask.sum(0).tolist()) == [1, 1, 2, 2]


# Correlated


def test_correlations_by_hand():
    # feature 1 is −2 times feature 0, feature 2 is constant
    inputs = torch.tensor([[1.0, -2.0, 0.1, 0.0], [2.0, -4.0, 0.1, 0.0], [3.0, -6.0, 0.1, 3.0], [4.0, -8.0, 0.1, 1.0]])
    # features 0 and 3, deviations (−1.5, −.5, .5, 1.5) and (−1, −1, 2, 0): 3/√(5·6) = 0.55
    strongest = [[0, 1], [1, 0]]
    weaker = [[0, 3], [1, 3], [3, 0], [3, 1]]
    assert csti(inputs, 4, 1 - 2 / 16).nonzero().tolist() == strongest
    assert csti(inputs, 4, 1 - 6 / 16).nonzero().tolist() == sorted(strongest + weaker)
    # 6 outputs: rows 4 and 5 are rows 0 and 1 again; 2 outputs: the first two rows
    tiled = csti(inputs, 6, 1 - 4 / 24)
    assert tiled.nonzero().tolist() == [[0, 1], [1, 0], [4, 1], [5, 0]]
    assert csti(inputs, 2, 1 - 4 / 8).nonzero().tolist() == [[0, 1], [0, 3], [1, 0], [1, 3]]


def test_correlated_against_corrcoef_and_in_blocks(monkeypatch):
    inputs = torch.randn(30, 40, generator=random_stream(0)).double() + 5
    expected = torch.corrcoef(inputs.t()).abs().fill_diagonal_(0)
    rows = torch.cat([expected, expected, expected])[:100]
    threshold = rows.flatten().sort(descending=True).values[799]
    mask = csti(inputs, 100, 0.8)
    assert mask[rows > threshold + 1e-6].all()
    assert not mask[rows < threshold - 1e-6].any()
    monkeypatch.setattr("hf_chts.topology.correlated._BLOCK_ROWS", 7)
    assert csti(inputs, 100, 0.8).equal(mask)
    assert csti(inputs * 1e180, 100, 0.8).equal(mask)


def test_the_models_correlations_are_tiled_over_a_layer_of_another_width():
    inputs = torch.randn(30, 7, generator=random_stream(0)).double()
    expected = torch.corrcoef(inputs.t()).abs().fill_diagonal_(0)
    mask = correlated(inputs, 16, 48, generator=random_stream(1), in_features=12)
    scores = torch.tensor([[expected[row % 7, column % 7] for column in range(12)] for row in range(16)])
    threshold = scores.flatten().sort(descending=True).values[47]
    assert mask.shape == (16, 12)
    assert mask.sum() == 48
    assert mask[scores > threshold + 1e-6].all()
    assert not mask[scores < threshold - 1e-6].any()


def test_equal_correlations_are_chosen_uniformly():
    inputs = torch.tensor([[0.1], [0.2], [0.7]]).repeat(1, 6) * torch.tensor([1.0, -3, 7, 0.3, 11, -5])
    counts = sum(csti(inputs, 6, 1 - 10 / 36, key=key).double() for key in range(300))
    assert counts.diagonal().eq(0).all()
    off = counts[~torch.eye(6, dtype=torch.bool)]  # 30 places, 10 of which are chosen 300 times
    assert off.min() > 60
    assert off.max() < 140


# All


@pytest.mark.parametrize(
    "network",
    [
        lambda key: small_world((30, 20), 0.8, key=key),
        lambda key: scale_free_network((30, 20), 0.8, key=key),
        lambda key: csti(torch.ones(3, 20), 30, 0.8, key=key),
    ],
)
def test_deterministic_and_different_by_key(network):
    state = torch.random.get_rng_state()
    assert network(3).equal(network(3))
    assert not network(3).equal(network(4))
    assert torch.random.get_rng_state().equal(state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small_world((8, 8), 0.5, beta=-0.1), "beta of the bipartite small world is -0.1"),
        (lambda: small_world((8, 8), 0.5, beta=1.1), r"is 1.1; it must lie in \[0, 1\]"),
        (lambda: small_world((0, 8), 0.5), "at least one node a side; got 0 x 8"),
        (lambda: scale_free_network((8, 8), -0.5), "links is 96; a layer of 8 x 8 has 0 to 64"),
        (lambda: csti(torch.ones(1, 4), 4, 0.5), "at least two calibration samples; got 1"),
        (lambda: csti(torch.ones(2, 3, 4), 4, 0.5), r"\(samples, in_features\); got \(2, 3, 4\)"),
        (lambda: csti(torch.tensor([[1.0, math.nan], [math.inf, 0]]), 4, 0.5), "2 of the 4 calibration inputs are not"),
        (lambda: csti(torch.ones(2, 4), 0, 0.5), "got 0 x 4"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

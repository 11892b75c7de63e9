"""Links drawn by their paths have the distribution of links drawn by their scores."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_chts.topology.initial import bipartite_receptive_field
from hf_chts.topology.link_prediction import ch2_l3n, ch3_l3n
from hf_chts.topology.link_sampling import sample_ch2_l3n, sample_ch3_l3n
from hf_chts.topology.random_streams import random_stream

PAIRS = {"CH2": (ch2_l3n, sample_ch2_l3n), "CH3": (ch3_l3n, sample_ch3_l3n)}


def network(shape, density, key=0):
    mask = torch.rand(shape, generator=random_stream("network", key)) < density
    mask[1], mask[:, 2] = False, False
    return mask


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.8])
@pytest.mark.parametrize("kind", ["random", "local"])
def test_many_draws_from_one_network_are_in_proportion_to_the_scores(name, density, kind):
    """Rows of several words, nodes that share nothing and nodes that share all but one link."""
    score, sample = PAIRS[name]
    mask = network((70, 150), density)
    if kind == "local":
        mask = bipartite_receptive_field(70, 150, round(70 * 150 * density), r=0.1, generator=random_stream("local"))
    expected = score(mask).double().flatten()
    expected /= expected.sum()
    k = int((~mask).sum()) // 400
    counts = torch.zeros(expected.numel(), dtype=torch.float64)
    generator = random_stream("many draws", name)
    rounds = 400
    for _ in range(rounds):
        # so few of all that drawing without replacement hardly shows
        counts += sample(mask, max(k, 1), generator=generator).flatten()
    draws = counts.sum()
    assert counts[expected == 0].eq(0).all()
    # in thirty bins, from the least likely links to the likeliest
    order = expected.argsort()
    order = order[expected[order] > 0]
    bins = (expected[order].cumsum(0) * 30).ceil().clamp_(max=30).long() - 1
    seen = torch.zeros(30, dtype=torch.float64).index_add_(0, bins, counts[order])
    wanted = torch.zeros(30, dtype=torch.float64).index_add_(0, bins, expected[order]) * draws
    likely = wanted > 5
    statistic = ((seen - wanted)[likely] ** 2 / wanted[likely]).sum()
    degrees = int(likely.sum())
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_no_product_is_made(name, density):
    """The counts of common neighbours are a product of the layer's size; paths need those of the pairs they meet."""

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "mm" not in func.overloadpacket.__name__, func
            return func(*args, **(kwargs or {}))

    mask = network((200, 90), density)
    _, sample = PAIRS[name]
    with Products():
        assert int(sample(mask, 300, generator=random_stream(0)).sum()) == 300


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (12, 12)])
def test_first_draw_is_in_proportion_to_the_score(name, shape):
    score, sample = PAIRS[name]
    mask = network(shape, 0.25)
    expected = score(mask).double().flatten()
    expected /= expected.sum()
    draws, counts = 6000, torch.zeros(expected.numel(), dtype=torch.float64)
    generator = random_stream("draws", name)
    for _ in range(draws):
        counts += sample(mask, 1, generator=generator).flatten()
    assert counts[expected == 0].eq(0).all()
    likely = draws * expected > 5
    statistic = ((counts - draws * expected)[likely] ** 2 / (draws * expected)[likely]).sum()
    degrees = int(likely.sum())
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_several_draws_are_without_replacement():
    """Against the inclusion frequencies of successive sampling by the scores, which test_sampling.py checks exactly."""
    from hf_chts.topology.sampling import choose

    mask = network((8, 10), 0.3)
    scores, draws, k = ch2_l3n(mask), 8000, 5
    assert 4 * k <= int((~mask).sum())  # or the paths are not used
    by_paths, by_scores = torch.zeros(8, 10, dtype=torch.float64), torch.zeros(8, 10, dtype=torch.float64)
    generator = random_stream("paths")
    for _ in range(draws):
        by_paths += sample_ch2_l3n(mask, k, generator=generator)
        by_scores += choose(scores, k, ~mask, soft=True, generator=generator)
    both = (by_paths + by_scores) > 0
    # twice the variance of one Bernoulli count bounds that of a difference of two
    spread = (by_paths + by_scores)[both] * (1 - (by_paths + by_scores)[both] / (2 * draws))
    statistic = ((by_paths - by_scores)[both] ** 2 / spread).sum()
    degrees = int(both.sum())
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("shape", [(64, 64), (200, 90), (90, 200), (300, 40)])
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 1.0])
def test_exactly_k_missing_links(shape, density, share):
    mask = network(shape, density)
    k = int(share * int((~mask).sum()))
    before = mask.clone()
    drawn = sample_ch2_l3n(mask, k, generator=random_stream(0))
    assert int(drawn.sum()) == k
    assert not (drawn & mask).any()
    assert mask.equal(before)


def test_links_without_a_score_are_drawn_once_the_others_run_out():
    mask = torch.zeros(30, 30, dtype=torch.bool)
    mask[0, :2] = mask[1, 1:3] = True  # two missing links have a path: (0, 2) and (1, 0)
    assert ch2_l3n(mask).nonzero().tolist() == [[0, 2], [1, 0]]
    drawn = sample_ch2_l3n(mask, 10, generator=random_stream(0))
    assert drawn[0, 2]
    assert drawn[1, 0]
    assert int(drawn.sum()) == 10
    empty = torch.zeros(30, 30, dtype=torch.bool)
    assert int(sample_ch2_l3n(empty, 7, generator=random_stream(0)).sum()) == 7


def test_deterministic():
    mask = network((80, 60), 0.1)
    first = sample_ch2_l3n(mask, 40, generator=random_stream(1))
    assert first.equal(sample_ch2_l3n(mask, 40, generator=random_stream(1)))
    assert not first.equal(sample_ch2_l3n(mask, 40, generator=random_stream(2)))


def test_too_many():
    with pytest.raises(ValueError, match="cannot choose"):
        sample_ch2_l3n(network((8, 8), 0.5), 60, generator=random_stream(0))

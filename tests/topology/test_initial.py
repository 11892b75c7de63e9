"""Initial topologies: exact links, degrees as asked, receptive fields where they belong."""

import math

import pytest
import torch

from hf_chts.topology.initial import bipartite_receptive_field, erdos_renyi
from hf_chts.topology.random_streams import random_stream

SHAPES = [(64, 64), (40, 200), (200, 40), (7, 3)]


def brf(shape, sparsity=0.9, *, key=0, **options):
    return bipartite_receptive_field(*shape, sparsity, generator=random_stream(key), **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.83, 0.95])
def test_exact_number_of_links(shape, sparsity):
    links = round(shape[0] * shape[1] * (1 - sparsity))
    assert int(erdos_renyi(*shape, sparsity, generator=random_stream(0)).sum()) == links
    for r in (0, 0.1, 0.5, 1):
        for degrees in ("fixed", "uniform"):
            assert int(brf(shape, sparsity, r=r, degree_distribution=degrees).sum()) == links


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("r", [0, 0.1, 1])
def test_fixed_degrees_are_equal(shape, r):
    degrees = brf(shape, 0.9, r=r).sum(1)
    mean = shape[1] * 0.1
    assert degrees.min() >= math.floor(mean)
    assert degrees.max() <= math.ceil(mean)


def test_uniform_degrees_follow_the_uniform_law():
    counts = torch.zeros(20)
    for key in range(20):
        degrees = brf((500, 100), 0.9, key=key, degree_distribution="uniform").sum(1)
        assert int(degrees.sum()) == 5000
        counts += torch.bincount(degrees, minlength=20)[:20]
    assert counts[0] == 0  # 1 … 19 around the mean of 10
    expected = 10_000 / 19
    assert float(((counts[1:] - expected) ** 2 / expected).sum()) < 54.0  # 18 degrees, p = 2e-5


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_r_0_takes_the_nearest_inputs(shape):
    outs, ins = shape
    mask = brf(shape, 0.9, r=0)
    inputs = torch.arange(ins, dtype=torch.float64)
    for row in range(outs):
        away = (inputs - row * ins / outs).abs()
        distance = torch.minimum(away, ins - away)
        taken, left = distance[mask[row]], distance[~mask[row]]
        assert taken.max() <= left.min() + 1e-9


@pytest.mark.parametrize("shape", [(64, 64), (40, 200), (200, 40), (63, 101)])
@pytest.mark.parametrize("degrees", ["fixed", "uniform"])
def test_every_input_is_in_some_centres_reach(shape, degrees):
    # centres are spread over the whole ring of inputs, so at r = 0 no input is left out for want of a near one
    mask = brf(shape, 0.9, r=0, degree_distribution=degrees)
    assert degrees == "uniform" or mask.any(0).all()
    middle = mask.sum(0).double().mean()
    # no side of the ring gets more than another: thirds of the inputs have the same number of links, within a degree
    thirds = [part.sum().item() / part.shape[1] for part in mask.tensor_split(3, dim=1)]
    assert max(thirds) - min(thirds) < (0.2 if degrees == "fixed" else 0.5) * middle


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_r_1_is_uniform_over_the_inputs(shape):
    outs, ins = shape
    counts = torch.zeros(shape)
    for key in range(200):
        counts += brf(shape, 0.9, key=key, r=1)
    # by distance from the centre: every diagonal as full as any other
    shifted = torch.stack([counts[i].roll(-round(i * ins / outs)) for i in range(outs)]).sum(0)
    expected = shifted.mean()
    assert float(((shifted - expected) ** 2 / expected).sum()) < ins + 5 * math.sqrt(2 * ins)


def test_links_fall_off_with_distance_as_the_formula_says():
    """One link per node: the probability of distance d is (1 + d)^-9 at r = 0.1, normalised over the ring."""
    ins = 31
    counts = torch.zeros(ins)
    for key in range(40):
        mask = bipartite_receptive_field(ins * 10, ins, 1 - 1 / ins, r=0.4, generator=random_stream(key))
        centres = torch.arange(ins * 10) // 10
        exact = torch.arange(ins * 10) % 10 == 0  # centres that fall on an input
        offsets = (mask.float().argmax(1) - centres) % ins
        counts += torch.bincount(offsets[exact], minlength=ins)
    distance = torch.minimum(torch.arange(ins), ins - torch.arange(ins)).double()
    probability = (1 + distance) ** (-(1 - 0.4) / 0.4)
    expected = counts.sum() * probability / probability.sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < 30 + 5 * math.sqrt(60)


def test_deterministic_and_different_by_key():
    assert torch.equal(brf((30, 30), key=3), brf((30, 30), key=3))
    assert not torch.equal(brf((30, 30), key=3), brf((30, 30), key=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": -0.1}, r"r of the bipartite receptive field is -0.1"),
        ({"r": 1.5}, r"is 1.5; it must lie in \[0, 1\]"),
        ({"degree_distribution": "normal"}, "'normal'; choose 'fixed' or 'uniform'"),
        ({"sparsity": 1.0}, r"sparsity is 1.0; it must lie in \[0, 1\)"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        brf((8, 8), **({"sparsity": 0.5} | change))

"""Initial topologies: exact links, degrees as asked, receptive fields where they belong."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_chts.topology import receptive_field
from hf_chts.topology.allocation import links_at
from hf_chts.topology.initial import bipartite_receptive_field, erdos_renyi
from hf_chts.topology.random_streams import random_stream
from hf_chts.topology.receptive_field import _log_time_of as log_time_of

SHAPES = [(64, 64), (40, 200), (200, 40), (7, 3)]


def brf(shape, sparsity=0.9, *, key=0, **options):
    return bipartite_receptive_field(
        *shape, links_at(math.prod(shape), sparsity), generator=random_stream(key), **options
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.83, 0.95])
def test_exact_number_of_links(shape, sparsity):
    links = round(shape[0] * shape[1] * (1 - sparsity))
    assert int(erdos_renyi(*shape, links, generator=random_stream(0)).sum()) == links
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
        mask = bipartite_receptive_field(ins * 10, ins, ins * 10, r=0.4, generator=random_stream(key))
        centres = torch.arange(ins * 10) // 10
        exact = torch.arange(ins * 10) % 10 == 0  # centres that fall on an input
        offsets = (mask.float().argmax(1) - centres) % ins
        counts += torch.bincount(offsets[exact], minlength=ins)
    distance = torch.minimum(torch.arange(ins), ins - torch.arange(ins)).double()
    probability = (1 + distance) ** (-(1 - 0.4) / 0.4)
    expected = counts.sum() * probability / probability.sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < 30 + 5 * math.sqrt(60)


def inclusion(shape, links, r, key, draws, draw):
    """How often each input is taken, (out, in), in `draws` networks."""
    counts = torch.zeros(shape, dtype=torch.float64)
    generator = random_stream("inclusion", key)
    for _ in range(draws):
        counts += draw(*shape, links, r=r, generator=generator)
    return counts


def by_keys(out_features, in_features, links, *, r, generator):
    """The definition, at its plainest: successive sampling of every row by a Gumbel key of every input."""
    centres = torch.arange(out_features, dtype=torch.float64) * in_features / out_features
    away = (torch.arange(in_features) - centres[:, None]).abs()
    distance = torch.minimum(away, in_features - away)
    uniform = torch.rand(distance.shape, dtype=torch.float64, generator=generator)
    keys = -torch.log(-torch.log(uniform)) - (1 - r) / r * torch.log1p(distance)
    degree = links // out_features
    mask = torch.zeros(out_features, in_features, dtype=torch.bool)
    return mask.scatter_(1, keys.topk(degree, dim=1).indices, True)


@pytest.mark.parametrize(
    ("r", "horizon"),
    [(r, "far enough") for r in (0.05, 0.1, 0.3, 0.6, 1)] + [(r, "too near") for r in (0.3, 0.6, 1)],
)
@pytest.mark.parametrize(("shape", "degree"), [((6, 40), 4), ((25, 60), 6), ((4, 16), 14)])
def test_inputs_are_taken_as_often_as_in_successive_sampling(shape, degree, r, horizon, monkeypatch):
    if horizon == "too near":
        # for most rows the time must be extended
        monkeypatch.setattr(
            receptive_field, "_log_time_of", lambda weights, expected: log_time_of(weights, 0.7 * expected)
        )
    draws, links = 400, degree * shape[0]
    ours = inclusion(shape, links, r, 0, draws, bipartite_receptive_field)
    plain = inclusion(shape, links, r, 1, draws, by_keys)
    assert ours.sum() == plain.sum() == draws * degree * shape[0]
    share = (ours + plain) / (2 * draws)
    some = (share > 5 / draws) & (share < 1 - 5 / draws)
    statistic = ((ours - plain)[some] ** 2 / (2 * draws * (share * (1 - share))[some])).sum()
    degrees = int(some.sum())
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("shape", [(64, 65), (300, 301), (40, 40), (1, 50), (50, 1), (400, 3), (3, 400), (1, 1)])
@pytest.mark.parametrize("r", [0, 1e-3, 0.01, 0.05, 0.1, 1])
def test_exact_number_of_links_where_fields_are_narrow_layers_dense_or_sides_short(shape, r):
    for sparsity in (0, 0.001, 0.1, 0.5, 0.9, 0.999):
        for key in range(3):
            mask = brf(shape, sparsity, key=key, r=r, degree_distribution=("fixed", "uniform")[key % 2])
            assert int(mask.sum()) == round(shape[0] * shape[1] * (1 - sparsity)), (sparsity, key)


@pytest.mark.parametrize("r", [0, 0.1, 0.5, 1])
def test_a_receptive_field_takes_work_in_proportion_to_its_links(r):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.dtype != torch.bool:
                    self.elements = max(self.elements, tensor.numel())
            return result

    with Largest() as largest:
        mask = brf((400, 10_000), 0.99, r=r)
    assert largest.elements < 8 * int(mask.sum())


def test_deterministic_and_different_by_key():
    assert torch.equal(brf((30, 30), key=3), brf((30, 30), key=3))
    assert not torch.equal(brf((30, 30), key=3), brf((30, 30), key=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": -0.1}, r"r of the bipartite receptive field is -0.1"),
        ({"r": 1.5}, r"is 1.5; it must lie in \[0, 1\]"),
        ({"degree_distribution": "normal"}, "'normal'; choose 'fixed' or 'uniform'"),
        ({"sparsity": -0.5}, "links is 96; a layer of 8 x 8 has 0 to 64"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        brf((8, 8), **({"sparsity": 0.5} | change))

"""Compiled loops, torch's operations and stacks of layers make the same choices, link by link."""

import pytest
import torch

from hf_chts import kernels
from hf_chts.topology import choosing, compiled, link_prediction, link_sampling
from hf_chts.topology.choosing import choose_among, choose_each
from hf_chts.topology.hashed_numbers import fractions, hashed, logarithm, race_keys, seeds_on, unsigned
from hf_chts.topology.parts import REGROWTH
from hf_chts.topology.random_streams import random_stream

SHAPES = [(1, 1), (1, 9), (9, 1), (1, 200), (64, 64), (70, 150), (200, 65)]


def network(shape, links):
    mask = torch.zeros(shape, dtype=torch.bool)
    order = torch.randperm(mask.numel(), generator=random_stream(*shape, links))
    mask.view(-1)[order[:links]] = True
    return mask


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        without(monkeypatch)


def without(monkeypatch):
    for module in (choosing, link_sampling):
        monkeypatch.setattr(module, "loops", lambda device: None)


@pytest.mark.parametrize("name", ["ch2_l3n", "ch3_l3n", "random"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 1e-9, 0.03, 0.1, 0.5, 0.9, 1.0])
def test_draws_are_the_same(name, shape, density, monkeypatch):
    pytest.importorskip("numba")
    numel = shape[0] * shape[1]
    mask = network(shape, min(-int(-density * numel // 1), numel))  # 1e-9 is one link
    missing = numel - int(mask.sum())
    draw = REGROWTH[name].stack_sampler
    for k in {min(1, missing), missing // 5, missing}:
        seeds = [-3, 2**62]
        compiled = [draw(mask[None], [k], [seed])[0] for seed in seeds]
        with monkeypatch.context() as patch:
            without(patch)
            alone = [draw(mask[None], [k], [seed])[0] for seed in seeds]
            stacked = draw(torch.stack([mask, mask]), [k, k], seeds)
        for first, second, third in zip(compiled, alone, stacked, strict=True):
            assert first.equal(second)
            assert first.equal(third)
            assert int(first.sum()) == k
            assert not (first & mask).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_race_keys_are_the_same(temperature, dtype):
    pytest.importorskip("numba")
    from hf_chts.topology import loops

    weights = torch.rand(1000, generator=random_stream(0), dtype=dtype) ** 8
    weights[::7] = 0
    keys = torch.empty(1000, dtype=torch.float64)
    assert loops.race_keys(weights.numpy(), unsigned(-5), temperature, keys.numpy())
    assert keys.equal(race_keys(weights[None], seeds_on([-5], weights.device), temperature)[0])
    weights[3] = float("nan")
    assert not loops.race_keys(weights.numpy(), unsigned(-5), temperature, keys.numpy())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("soft", [False, True])
def test_layers_of_a_stack_choose_as_alone(soft):
    """Layers with different numbers of candidates, of links to choose and temperatures, ties among them."""
    scores = (torch.rand(4, 12, 20, generator=random_stream(1)) * 4).round() / 4
    candidates = torch.rand(4, 12, 20, generator=random_stream(2)) < torch.tensor([0.2, 0.5, 0.9, 1.0])[:, None, None]
    k, seeds, temperatures = [0, 30, 200, 239], [1, -2, 3, 4], [1.0, 0.5, 3.0, 9.0]
    together = choose_each(scores, k, candidates, seeds, soft=soft, temperature=temperatures)
    assert together.flatten(1).sum(1).tolist() == k
    assert not (together & ~candidates).any()
    for n in range(4):
        one = slice(n, n + 1)
        alone = choose_each(scores[one], k[one], candidates[one], seeds[one], soft=soft, temperature=temperatures[n])
        assert alone[0].equal(together[n])


def test_a_stack_is_refused_for_one_bad_score():
    values = torch.ones(6)
    values[4] = -1
    with pytest.raises(ValueError, match="minimum of -1.0"):
        choose_among(values, [3, 3], [2, 2], [0, 0], soft=False)


def test_hashed_numbers():
    # SplitMix64 from the seed 1234567: its published first outputs; a counter starts one step before its numbers
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    bits = hashed(seeds_on([1234567], torch.device("cpu")), torch.arange(1, 5))[0]
    assert [x & (2**64 - 1) for x in bits.tolist()] == published
    uniform = fractions(hashed(seeds_on([9], torch.device("cpu")), torch.arange(10**5)))
    assert 0 <= float(uniform.min()) < 1e-3 < 0.999 < float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(uniform.var()) == pytest.approx(1 / 12, abs=0.002)


def test_logarithm():
    x = torch.logspace(-300, 300, 10001, dtype=torch.float64)
    torch.testing.assert_close(logarithm(x.clone()), x.log(), rtol=1e-12, atol=0)
    near = 1 + torch.linspace(-0.4, 0.6, 1001, dtype=torch.float64)
    torch.testing.assert_close(logarithm(near.clone()), near.log(), rtol=1e-12, atol=1e-16)
    assert logarithm(torch.ones(1, dtype=torch.float64)) == 0


@pytest.mark.parametrize("shape", [(7, 11), (300, 40)])
def test_scores_of_a_stack_as_a_device_computes_them(shape):
    masks = torch.rand(3, *shape, generator=random_stream(*shape)) < 0.2
    strength = link_prediction.ch2_strength
    together = link_prediction._scores_of_stack(masks, strength)
    alone = torch.stack([link_prediction.node_based_scores(mask, strength) for mask in masks])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("shape", [*SHAPES, (300, 40)])
@pytest.mark.parametrize("density", [0.0, 1e-9, 0.1, 1.0])
def test_common_neighbours_counted_link_by_link_are_the_product(shape, density, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(link_prediction, "_PER_INCREMENT", 0)
    monkeypatch.setattr(link_prediction, "_PER_INCREMENT_OF_8_BIT", 0)
    mask = network(shape, -int(-density * shape[0] * shape[1] // 1))
    for side in (mask, mask.t()):
        counted = list(link_prediction._common_by_links(side))
        links = side.double()
        assert torch.cat([common for _, common in counted]).double().equal(links @ links.t())
        assert [rows.start for rows, _ in counted] == list(range(0, len(side), 128))


def test_scores_do_not_depend_on_how_common_neighbours_are_counted(monkeypatch):
    mask = network((200, 65), 700)
    scores = []
    for ratio in (0, 10**9):
        for name in ("_PER_INCREMENT", "_PER_INCREMENT_OF_8_BIT"):
            monkeypatch.setattr(link_prediction, name, ratio)
        scores.append(link_prediction.ch3_l3n(mask))
    assert scores[0].equal(scores[1])


def test_a_numba_that_does_not_run_is_none(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: False)
    assert compiled._module.__wrapped__() is None

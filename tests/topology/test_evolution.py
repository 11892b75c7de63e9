"""Updates worked out by hand on a 4x5 layer, and the invariants of any update."""

from functools import partial

import pytest
import torch

from hf_chts.topology.evolution import Choice, LayerEvolution, regrow, remove, selected
from hf_chts.topology.gmp import largest_weights
from hf_chts.topology.link_prediction import ch2_l3n
from hf_chts.topology.random_streams import random_seed, random_stream
from hf_chts.topology.sampling import choose
from hf_chts.topology.scores import gradient, magnitude, mest, random, relative_importance

WEIGHT = torch.tensor(
    [
        [0.9, 0.0, -0.1, 0.0, 0.4],
        [0.0, 0.8, 0.0, -0.2, 0.0],
        [-0.7, 0.0, 0.3, 0.0, 0.0],
        [0.0, 0.6, 0.0, 0.0, -0.5],
    ]
)
MASK = WEIGHT != 0  # 9 links


def step(weight=WEIGHT, mask=MASK, *, links=9, drop_fraction=0.3, removal=None, regrowth=None, pruning=None, key=0):
    def seeds(purpose):
        return [random_seed(key, purpose)]

    halves = remove(
        weight[None], mask[None], links=[links], drop_fraction=drop_fraction, removal=removal or Choice(magnitude),
        pruning=pruning or Choice(magnitude), seeds=seeds,
    )  # fmt: skip
    (new,), (returned,) = regrow(halves, links=[links], regrowth=regrowth or Choice(random), seeds=seeds)
    (before,), (stayed,), (left,) = halves.before, halves.stayed, halves.left
    return LayerEvolution(new, before - stayed, stayed - left, links - left, int(returned))


# ζ·9 links to the nearest whole, and which go: -0.1, then -0.2, 0.3, 0.4, …
@pytest.mark.parametrize(
    ("drop_fraction", "gone"),
    [
        (0.0, []),
        (0.1, [(0, 2)]),
        (0.22, [(0, 2), (1, 3)]),
        (0.33, [(0, 2), (1, 3), (2, 2)]),
        (0.5, [(0, 2), (1, 3), (2, 2), (0, 4)]),
    ],
)
def test_set_keeps_the_largest_and_regrows_as_many(drop_fraction, gone):
    for key in range(20):
        result = step(drop_fraction=drop_fraction, key=key)
        kept = MASK.clone()
        for link in gone:
            kept[link] = False
        assert (result.mask & kept).equal(kept)
        assert int(result.mask.sum()) == 9
        assert (result.removed, result.regrown, result.pruned) == (len(gone), len(gone), 0)
        removed = MASK & ~kept
        back = int((removed & result.mask).sum())
        assert result.overlap == (back / len(gone) if gone else 0.0)


def test_regrowth_by_a_given_score_is_exact():
    wanted = torch.zeros(4, 5)
    wanted[0, 1], wanted[3, 3], wanted[1, 0] = 3.0, 2.0, 1.0
    result = step(drop_fraction=0.33, regrowth=Choice(lambda mask: wanted * ~mask))
    expected = MASK.clone()
    expected[0, 2] = expected[1, 3] = expected[2, 2] = False
    expected[0, 1] = expected[3, 3] = expected[1, 0] = True
    assert result.mask.equal(expected)
    assert result.overlap == 0.0


def test_a_link_that_was_just_removed_may_come_back():
    wanted = torch.zeros(4, 5)
    wanted[0, 2], wanted[1, 3] = 1.0, 1.0  # the two smallest
    result = step(drop_fraction=0.22, regrowth=Choice(lambda mask: wanted * ~mask))
    assert result.mask.equal(MASK)
    assert result.overlap == 1.0


def test_falling_density_prunes_first_then_replaces():
    # 9 → 6 links: 0.1, 0.2, 0.3 are pruned; ζ = 1/3 of the 6 left removes 0.4 and 0.5; two are regrown
    wanted = torch.zeros(4, 5)
    wanted[2, 4], wanted[0, 2] = 2.0, 1.0  # (0, 2) was pruned, and is a candidate as any other
    result = step(links=6, drop_fraction=1 / 3, regrowth=Choice(lambda mask: wanted * ~mask))
    expected = torch.zeros(4, 5, dtype=torch.bool)
    for link in [(0, 0), (1, 1), (2, 0), (3, 1), (2, 4), (0, 2)]:
        expected[link] = True
    assert result.mask.equal(expected)
    assert (result.pruned, result.removed, result.regrown, result.overlap) == (3, 2, 2, 0.0)


def test_pruning_uses_its_own_score():
    # by relative importance the smallest are (0, 2), (2, 2)? — worked out below from row and column shares
    shares = WEIGHT.abs() / WEIGHT.abs().sum(1, keepdim=True) + WEIGHT.abs() / WEIGHT.abs().sum(0, keepdim=True)
    smallest = shares[MASK].sort().values[:2]
    result = step(links=7, drop_fraction=0.0, pruning=Choice(relative_importance))
    assert result.mask.equal(MASK & (shares > smallest[-1] + 1e-3))
    assert not result.mask.equal(step(links=7, drop_fraction=0.0).mask)


def test_rising_density_only_adds():
    result = step(links=12, drop_fraction=0.0)
    assert int(result.mask.sum()) == 12
    assert (result.mask & MASK).equal(MASK)


@pytest.mark.parametrize("shape", [(16, 16), (10, 60), (60, 10)])
@pytest.mark.parametrize("links_share", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("soft", [False, True])
def test_exact_links_for_chts(shape, links_share, soft):
    generator = random_stream(1)
    mask = torch.rand(shape, generator=generator) < 0.3
    weight = torch.randn(shape, generator=generator) * mask
    before = weight.clone()
    target = round(int(mask.sum()) * links_share)
    result = step(
        weight,
        mask,
        links=target,
        drop_fraction=0.2,
        removal=Choice(magnitude, soft=soft, temperature=3.0),
        regrowth=Choice(ch2_l3n, soft=soft),
        pruning=Choice(relative_importance),
    )
    assert int(result.mask.sum()) == target
    assert weight.equal(before)
    assert result.removed == round(0.2 * target)
    assert result.pruned == int(mask.sum()) - target


def test_soft_removal_prefers_small_weights_and_gets_harder():
    generator = random_stream(2)
    mask = torch.ones(50, 50, dtype=torch.bool)
    weight = torch.randn(50, 50, generator=generator)
    cold = {}
    for temperature in (1.0, 9.0):
        kept = step(
            weight, mask, links=1250, drop_fraction=0.0, pruning=Choice(magnitude, soft=True, temperature=temperature)
        ).mask
        hard = step(weight, mask, links=1250, drop_fraction=0.0).mask
        cold[temperature] = int((kept & hard).sum()) / 1250
    assert 0.6 < cold[1.0] < cold[9.0] < 1.0


GRADIENT = torch.tensor(
    [
        [9.0, -0.5, 9.0, 0.1, 9.0],
        [0.2, 9.0, -0.9, 9.0, 0.3],
        [9.0, 0.4, 9.0, -0.8, 0.0],
        [-0.7, 9.0, 0.6, 0.0, 9.0],
    ]
)


# RigL: ζ·9 smallest weights go, as many missing links with the largest |gradient| come; those just removed have 9
@pytest.mark.parametrize(
    ("drop_fraction", "gone", "come"),
    [
        (0.1, [(0, 2)], [(0, 2)]),
        (0.33, [(0, 2), (1, 3), (2, 2)], [(0, 2), (1, 3), (2, 2)]),
    ],
)
def test_rigl_takes_the_largest_gradients(drop_fraction, gone, come):
    result = step(drop_fraction=drop_fraction, regrowth=Choice(partial(gradient, grad=GRADIENT[None])))
    expected = MASK.clone()
    for link in gone:
        expected[link] = False
    for link in come:
        expected[link] = True
    assert result.mask.equal(expected)
    # without gradients on what was removed, the largest elsewhere: 0.9, 0.8, 0.7
    elsewhere = GRADIENT.masked_fill(MASK, 0)
    result = step(drop_fraction=0.33, regrowth=Choice(partial(gradient, grad=elsewhere[None])))
    expected = MASK.clone()
    for link in [(0, 2), (1, 3), (2, 2)]:
        expected[link] = False
    for link in [(1, 2), (2, 3), (3, 0)]:
        expected[link] = True
    assert result.mask.equal(expected)


def test_mest_keeps_small_weights_with_large_gradients():
    grad = torch.zeros(4, 5)
    grad[0, 2] = -25.0  # 0.1 + 0.01 · 25 = 0.35: now above 0.2 and 0.3
    assert mest(WEIGHT, MASK, grad)[0, 2] == pytest.approx(0.35)
    result = step(
        drop_fraction=0.22, removal=Choice(partial(mest, grad=grad)), regrowth=Choice(lambda mask: mask * 0.0)
    )
    assert result.mask[0, 2]
    assert mest(WEIGHT, MASK, GRADIENT)[~MASK].eq(0).all()


def test_gmp_weights_may_return():
    stored = torch.zeros(4, 5)
    stored[0, 1], stored[3, 3], stored[2, 4] = 0.65, -0.45, 0.05
    # 9 → 7 links; by size 0.9 0.8 0.7 0.65 0.6 0.5 0.45 | 0.4 0.3 0.2 0.1
    seven = partial(choose, k=7, candidates=torch.ones_like(MASK), soft=False, generator=random_stream(0))
    result = selected(MASK, largest_weights(WEIGHT, MASK, stored, seven))
    expected = torch.zeros(4, 5, dtype=torch.bool)
    for link in [(0, 0), (1, 1), (2, 0), (0, 1), (3, 1), (3, 4), (3, 3)]:
        expected[link] = True
    assert result.mask.equal(expected)
    assert (result.pruned, result.removed, result.regrown) == (2, 2, 2)
    assert stored[0, 1] == 0.65


def test_bad_input():
    with pytest.raises(ValueError, match=r"links is 21; a layer of \(4, 5\)"):
        step(links=21)
    with pytest.raises(ValueError, match=r"drop_fraction is 1\.2"):
        step(drop_fraction=1.2)
    broken = WEIGHT.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        step(broken)

"""Adaptive softness: layers in an epitopological local minimum get softer, those that only churn harder."""

import pytest
import torch

from hf_chts import SparsityConfig
from hf_chts.evolution.update import TopologyUpdate
from hf_chts.topology.softness import LOWEST, adapted, chance_overlap, temperature


def test_the_rule_by_hand():
    # T = 1, no excess: log T + 2 · 0.2
    assert temperature(adapted(0.5, 0.05, 0.05, 0.9)) == pytest.approx(2.718281828**0.4)
    # everything comes back: log T + 2 · (0.2 − 1)
    assert temperature(adapted(0.5, 1.0, 0.05, 0.9)) == pytest.approx(2.718281828**-1.6)
    # an excess of a fifth: T rests. overlap = 0.1 + 0.2 · 0.9
    assert adapted(0.7, 0.28, 0.1, 0.9) == pytest.approx(0.7)
    # less than chance is no excess
    assert adapted(0.5, 0.0, 0.5, 0.9) == adapted(0.5, 0.5, 0.5, 0.9)


def test_it_stays_within_its_bounds():
    soft = hard = 0.5
    for _ in range(50):
        soft, hard = adapted(soft, 1.0, 0.0, 0.9), adapted(hard, 0.0, 0.0, 0.9)
    assert (soft, hard) == (LOWEST, 0.9)
    assert adapted(0.0, 0.0, 0.0, 0.9) > LOWEST  # from uniform removal there is a way back
    assert adapted(0.0, 1.0, 0.0, 0.0) == 0.0
    assert adapted(0.05, 1.0, 0.0, 0.05) == pytest.approx(0.05)


def test_chance_overlap_is_that_of_uniform_draws():
    # 10 links, 3 removed, 3 of 13 missing regrown: each of the 13 as likely
    assert chance_overlap(3, 3, 10) == pytest.approx(3 / 13)
    assert chance_overlap(0, 0, 0) == 0.0
    generator = torch.Generator().manual_seed(0)
    removed = sum(int((torch.randperm(13, generator=generator)[:3] < 3).sum()) for _ in range(4000))
    assert removed / (3 * 4000) == pytest.approx(3 / 13, abs=0.01)


def update(mask, weight, softness, number, regrowth="ch3_l3n", choice="hard"):
    """One CHTs-like update of a lone layer: (its new mask, its next softness)."""
    config = SparsityConfig(
        method="chts", sparsity=1 - float(mask.double().mean()), update_interval=1, drop_fraction=0.2,
        drop_schedule="constant", regrowth=regrowth, regrowth_choice=choice, softness_schedule="adaptive",
    )  # fmt: skip
    links = int(mask.sum())
    step = TopologyUpdate(
        config.plan(1000), number, {"layer": mask}, {"layer": links}, {}, {}, softness={"layer": softness}
    )
    done = step.evolve(["layer"], {"layer": weight * mask})["layer"]
    chance = chance_overlap(done.removed, done.regrown, mask.numel() - links)
    return done.mask, adapted(softness, done.overlap, chance, 0.9)


def test_a_layer_in_an_epitopological_local_minimum_gets_softer():
    # a full block in an empty layer: only inside it are there paths of length 3, so what leaves it comes straight back
    block = torch.zeros(20, 20, dtype=torch.bool)
    block[:8, :8] = True
    weight = torch.rand(20, 20, generator=torch.Generator().manual_seed(0)) + 0.1
    mask, course = block, [0.8]
    for number in range(1, 6):
        mask, softness = update(mask, weight, course[-1], number)
        assert mask.equal(block)  # stuck: every link regrown is one that was just removed
        course.append(softness)
    assert course == sorted(course, reverse=True)
    assert course[-1] == LOWEST


def test_a_layer_that_only_churns_gets_harder():
    mask = torch.rand(40, 40, generator=torch.Generator().manual_seed(1)) < 0.1
    weight = torch.rand(40, 40, generator=torch.Generator().manual_seed(2)) + 0.1
    softness = 0.5
    for number in range(1, 8):
        mask, softness = update(mask, weight, softness, number, regrowth="random", choice="soft")
    assert softness > 0.85

"""Schedules against golden figures and their own ends."""

from pathlib import Path

import numpy as np
import pytest

from hf_chts.topology import schedules

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "reference_scores.npz")
FUNCTIONS = {"linear": schedules.linear, "granet": schedules.cubic, "s_shape": schedules.sigmoid}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_golden_figures(name):
    values = [FUNCTIONS[name](step, 0, 4000, 0.5, 0.9) for step in range(0, 4001, 100)]
    np.testing.assert_allclose(values, GOLDEN[f"schedule/{name}"], rtol=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS.values())
def test_ends_are_exact_and_nothing_moves_outside(function):
    assert function(0, 10, 50, 0.5, 0.93) == 0.5
    assert function(10, 10, 50, 0.5, 0.93) == 0.5
    assert function(50, 10, 50, 0.5, 0.93) == 0.93
    assert function(99, 10, 50, 0.5, 0.93) == 0.93


def test_sigmoid_is_symmetric_and_steeper_with_k():
    assert schedules.sigmoid(50, 0, 100, 0.0, 1.0) == pytest.approx(0.5)
    assert schedules.sigmoid(20, 0, 100, 0.0, 1.0) == pytest.approx(1 - schedules.sigmoid(80, 0, 100, 0.0, 1.0))
    assert schedules.sigmoid(25, 0, 100, 0.0, 1.0, k=12) < schedules.sigmoid(25, 0, 100, 0.0, 1.0, k=6)


def test_cosine_anneal():
    assert schedules.cosine_anneal(0, 100, 0.3) == pytest.approx(0.3)
    assert schedules.cosine_anneal(50, 100, 0.3) == pytest.approx(0.15)
    assert schedules.cosine_anneal(100, 100, 0.3) == pytest.approx(0.0)
    assert schedules.cosine_anneal(150, 100, 0.3) == pytest.approx(0.0)


def test_elastic():
    values = {step: schedules.elastic(step, 100, 0.9) for step in (0, 59, 60, 99, 100, 120)}
    assert values == {0: 0.85, 59: 0.85, 60: 0.875, 99: 0.875, 100: 0.9, 120: 0.9}


def test_bad_input():
    with pytest.raises(ValueError, match="start 5 and end 5"):
        schedules.linear(0, 5, 5, 0.0, 1.0)
    with pytest.raises(ValueError, match="k of the sigmoid is 0"):
        schedules.sigmoid(0, 0, 5, 0.0, 1.0, k=0)

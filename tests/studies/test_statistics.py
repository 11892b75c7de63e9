"""Means and errors, by hand and by numpy and scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from hf_chts.studies.figures import best_of
from hf_chts.studies.statistics import Estimate, difference_to, estimate, paired


def test_by_hand():
    # deviations −1, 0, 1: variance 2/2 = 1, so the error is 1/√3
    assert estimate([1.0, 2.0, 3.0]) == Estimate(2.0, pytest.approx(1 / math.sqrt(3)), 3)
    # deviations ±2: variance 8/1, so the error is √8/√2
    assert estimate([3.0, 7.0]) == Estimate(5.0, pytest.approx(2.0), 2)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_as_scipy_and_numpy(count):
    values = (90 + np.random.default_rng(count).normal(size=count)).tolist()
    found = estimate(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.error == pytest.approx(stats.sem(values))
    assert found.count == count


def test_one_value_has_no_error_and_none_has_no_mean():
    assert estimate([5.0]) == Estimate(5.0, None, 1)
    assert estimate([5.0]).outside is None
    assert estimate([]) is None


def test_a_paired_difference_is_over_shared_seeds():
    # seed 2 and seed 7 have no partner; differences of seeds 0 and 1 are 1 and 3: mean 2, error √2/√2
    found = paired({0: 11.0, 1: 23.0, 2: 1.0}, {1: 20.0, 0: 10.0, 7: 50.0})
    assert found == Estimate(2.0, pytest.approx(1.0), 2)
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert paired({0: 3.0, 4: 1.0}, {0: 1.0}) == Estimate(2.0, None, 1)


def test_a_paired_error_leaves_out_what_seeds_do_to_both():
    values, reference = {0: 10.0, 1: 20.0, 2: 30.0}, {0: 9.0, 1: 19.0, 2: 29.0}
    found = paired(values, reference)
    assert (found.mean, found.error) == (1.0, 0.0)
    assert found.error == pytest.approx(stats.sem([values[seed] - reference[seed] for seed in values]))


@pytest.mark.parametrize(
    ("mean", "error", "outside"), [(2.01, 1, True), (-2.01, 1, True), (2, 1, False), (0, 0, False)]
)
def test_outside_is_more_than_two_errors_from_zero(mean, error, outside):
    assert Estimate(mean, error, 3).outside is outside


@pytest.mark.parametrize("count", [3, 4, 5, 10])
def test_significant_is_what_chance_does_in_5_cases_of_100(count):
    errors = stats.t.ppf(0.975, count - 1)
    for sign in (1, -1):
        assert Estimate(sign * (errors + 0.006), 1.0, count).significant
        assert not Estimate(sign * (errors - 0.006), 1.0, count).significant


def test_of_two_values_nothing_is_said():
    assert Estimate(100.0, 1.0, 2).outside is None
    assert not Estimate(100.0, 1.0, 2).significant
    assert not Estimate(100.0, None, 1).significant


def test_the_difference_to_a_published_figure_joins_both_errors():
    assert difference_to(Estimate(90.0, 0.3, 3), 91.0, 0.4) == Estimate(-1.0, pytest.approx(0.5), 3)
    assert difference_to(Estimate(90.0, 0.3, 3), 91.0) == Estimate(-1.0, None, 3)  # whose own error is not known
    assert difference_to(Estimate(90.0, None, 1), 91.0, 0.4) == Estimate(-1.0, None, 1)


@pytest.mark.parametrize(
    ("values", "sparsity", "better", "expected"),
    [
        ([80.0, 90.0, 85.0, 86.0, 85.0], [0.5, 0.9, 0.99, 0.99, 0.99], "higher", 3),
        ([2.5, 1.8, 2.6, 2.5], [0.94, 0.965, 0.990003, 0.990003], "lower", 3),
        ([1.0, 1.0], [0.0, 0.0], "lower", 0),
        ([math.nan, 2.0, math.inf, 3.0], [0.9] * 4, "lower", 1),
        ([math.nan], [0.9], "lower", None),
        ([], [], "higher", None),
    ],
)
def test_the_best_evaluation_is_one_of_the_model_that_was_asked_for(values, sparsity, better, expected):
    assert best_of(values, sparsity, better) == expected

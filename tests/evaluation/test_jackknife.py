import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, matthews_corrcoef

from hf_chts.evaluation import jackknife


def samples(seed, classes, count):
    """True and predicted labels; half of the predictions are right."""
    generator = np.random.default_rng(seed)
    gold = generator.choice(classes, count, p=generator.dirichlet(np.ones(classes)))
    guessed = generator.integers(classes, size=count)
    return list(zip(gold.tolist(), np.where(generator.random(count) < 0.5, gold, guessed).tolist(), strict=True))


def test_error_of_a_mean_is_the_usual_one():
    values = np.random.default_rng(0).normal(size=50)
    found = jackknife.standard_error(jackknife.means_without_each(values))
    assert found == pytest.approx(values.std(ddof=1) / 50**0.5)
    assert jackknife.standard_error([]) is jackknife.standard_error([1.0]) is None


def test_values_without_each_by_brute_force():
    generator = np.random.default_rng(1)
    above, below = generator.random(9), 1 + generator.random(9)
    pairs = samples(2, 2, 12)

    def right_and_first(chosen):
        return sum(a == b for a, b in chosen) * 10 + chosen.count(pairs[0])

    ratios = [np.delete(above, i).sum() / np.delete(below, i).sum() for i in range(9)]
    assert jackknife.ratios_without_each(above, below) == pytest.approx(ratios)
    expected = [right_and_first(pairs[:i] + pairs[i + 1 :]) for i in range(12)]
    assert jackknife.scores_without_each(pairs, right_and_first).tolist() == expected


@pytest.mark.parametrize("metric", [matthews_corrcoef, balanced_accuracy_score])
def test_error_agrees_with_a_bootstrap(metric):
    pairs = samples(5, 3, 400)

    def score(chosen):
        return metric(*zip(*chosen, strict=True))

    generator = np.random.default_rng(0)
    draws = [score([pairs[i] for i in generator.integers(400, size=400)]) for _ in range(200)]
    found = jackknife.standard_error(jackknife.scores_without_each(pairs, score))
    assert found == pytest.approx(np.std(draws), rel=0.15)

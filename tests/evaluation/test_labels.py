import warnings

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, matthews_corrcoef

from hf_chts.evaluation import jackknife
from hf_chts.evaluation.labels import LABEL_SCORES, confusion_matrix, trivial_score

REFERENCE = {"acc": accuracy_score, "mcc": matthews_corrcoef, "balanced_acc": balanced_accuracy_score}


def samples(seed, classes, count):
    generator = np.random.default_rng(seed)
    gold = generator.choice(classes, count, p=generator.dirichlet(np.ones(classes)))
    guessed = generator.integers(classes, size=count)
    return gold, np.where(generator.random(count) < 0.5, gold, guessed)


def cases():
    for seed in range(20):
        yield samples(seed, 2 + seed % 4, 5 + 7 * seed)
    yield np.zeros(6, int), np.array([0, 1, 0, 1, 1, 1])  # one class only in the samples
    yield np.array([0, 1, 1, 2, 2, 2]), np.ones(6, int)  # or in the answers
    yield np.zeros(4, int), np.zeros(4, int)
    yield np.array([1]), np.array([1])


@pytest.mark.parametrize("metric", REFERENCE)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
def test_scores_are_those_of_scikit_learn(metric):
    for gold, predicted in cases():
        classes = 1 + max(gold.max(), predicted.max())
        confusion = confusion_matrix(gold, predicted, classes + 1)  # a class that nobody names changes nothing
        assert LABEL_SCORES[metric](confusion) == pytest.approx(REFERENCE[metric](gold, predicted), abs=1e-12)
        constant = max(REFERENCE[metric](gold, np.full_like(gold, label)) for label in range(classes))
        assert trivial_score(LABEL_SCORES[metric], confusion) == pytest.approx(constant, abs=1e-12)


def test_counts_of_a_large_task():
    # products of three counts that do not fit into 64 bits
    confusion = np.array([[3_000_000, 1_000_000], [1_000_000, 3_000_000]])
    assert LABEL_SCORES["mcc"](confusion) == pytest.approx(0.5)


def test_confusion_matrix_by_hand():
    assert confusion_matrix([0, 0, 1, 1, 1], [0, 1, 1, 1, 0], 2).tolist() == [[1, 1], [1, 2]]
    with pytest.raises(ValueError, match="from -1 to 1"):
        confusion_matrix([0, -1, 1], [0, 0, 0], 2)
    with pytest.raises(ValueError, match="2 true labels and 1 predicted"):
        confusion_matrix([0, 1], [0], 2)


def test_error_of_a_mean_is_the_usual_one():
    values = np.random.default_rng(0).normal(size=50)
    found = jackknife.standard_error(jackknife.means_without_each(values))
    assert found == pytest.approx(values.std(ddof=1) / 50**0.5)
    assert jackknife.standard_error([]) is jackknife.standard_error([1.0]) is None


def test_values_without_each_by_brute_force():
    generator = np.random.default_rng(1)
    above, below = generator.random(9), 1 + generator.random(9)
    pairs = [(int(a), int(b)) for a, b in zip(*samples(2, 2, 12), strict=True)]

    def f1(chosen):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(f1_score(*zip(*chosen, strict=True)))

    ratios = [np.delete(above, i).sum() / np.delete(below, i).sum() for i in range(9)]
    assert jackknife.ratios_without_each(above, below) == pytest.approx(ratios)
    assert jackknife.scores_without_each(pairs, f1).tolist() == [f1(pairs[:i] + pairs[i + 1 :]) for i in range(12)]


@pytest.mark.parametrize("metric", ["mcc", "balanced_acc"])
def test_error_agrees_with_a_bootstrap(metric):
    gold, predicted = samples(5, 3, 400)
    pairs = list(zip(gold.tolist(), predicted.tolist(), strict=True))

    def score(chosen):
        return LABEL_SCORES[metric](confusion_matrix([p[0] for p in chosen], [p[1] for p in chosen], 3))

    generator = np.random.default_rng(0)
    draws = [score([pairs[i] for i in generator.integers(400, size=400)]) for _ in range(400)]
    found = jackknife.standard_error(jackknife.scores_without_each(pairs, score))
    assert found == pytest.approx(np.std(draws), rel=0.15)

"""Scores of classifiers from their confusion matrices, and what an answer without a look at the question scores."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Confusion = npt.NDArray[np.int64]


def confusion_matrix(gold: Sequence[int], predicted: Sequence[int], classes: int) -> Confusion:
    """How often each label was answered with which: rows are true labels, columns predicted ones; (classes, classes).

    Raises:
        ValueError: a label is not in 0 … classes − 1, or the two are not equally long.
    """
    true, answered = np.asarray(gold, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    if true.shape != answered.shape:
        raise ValueError(f"{len(true)} true labels and {len(answered)} predicted ones: pass one of each per sample.")
    for labels in (true, answered):
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"labels go from {labels.min()} to {labels.max()}, with {classes} classes: start at 0.")
    return np.bincount(true * classes + answered, minlength=classes * classes).reshape(classes, classes)


def accuracy(confusion: Confusion) -> float:
    return float(np.trace(confusion) / confusion.sum())


def matthews_correlation(confusion: Confusion) -> float:
    """Matthews correlation coefficient over any number of classes (Gorodkin 2004), from −1 to 1.

    0, where it would be 0/0: one class only in the samples, or in the answers.
    """
    # as Python integers: the products of three counts of a large task do not fit into 64 bits
    true, answered = confusion.sum(axis=1).tolist(), confusion.sum(axis=0).tolist()
    total, right = sum(true), int(np.trace(confusion))
    spread = (total**2 - sum(a * a for a in answered)) * (total**2 - sum(t * t for t in true))
    if spread == 0:
        return 0.0
    return float((right * total - sum(t * a for t, a in zip(true, answered, strict=True))) / spread**0.5)


def balanced_accuracy(confusion: Confusion) -> float:
    """Mean over the classes that occur among the true labels of the share that was answered rightly."""
    occurring = confusion.sum(axis=1) > 0
    return float(np.mean(np.diag(confusion)[occurring] / confusion.sum(axis=1)[occurring]))


# in the names of the harness, where it has one
LABEL_SCORES: dict[str, Callable[[Confusion], float]] = {
    "acc": accuracy,
    "mcc": matthews_correlation,
    "balanced_acc": balanced_accuracy,
}


def trivial_score(score: Callable[[Confusion], float], confusion: Confusion) -> float:
    """The best that always giving one and the same answer would have scored on these samples.

    For the accuracy this is the share of the most frequent true label, for the balanced accuracy 1 / (classes that
    occur), for the Matthews correlation 0.
    """
    constant_answers = []
    for label in range(len(confusion)):
        constant = np.zeros_like(confusion)
        constant[:, label] = confusion.sum(axis=1)
        constant_answers.append(score(constant))
    return max(constant_answers)

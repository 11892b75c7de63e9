"""Standard errors, scores of classifiers and trivial baselines, from the harness's records of single documents.

Imported late, as it imports the harness.
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
from lm_eval.api import metrics as harness_metrics
from lm_eval.api.task import ConfigurableTask, Task
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, matthews_corrcoef

from hf_chts.evaluation import jackknife

Sample = dict[str, Any]

# with more different values they are not labels, and leaving each out once would take long
_MOST_DIFFERENT_VALUES = 100

# by the harness's names, if it has one; each of (true labels, predicted labels)
_LABEL_SCORES: dict[str, Callable[[Sequence[int], Sequence[int]], float]] = {
    "acc": accuracy_score,
    "mcc": matthews_corrcoef,
    "balanced_acc": balanced_accuracy_score,
}


@dataclass
class TaskScores:
    """What the records of one task add to the harness's own figures.

    Attributes:
        scores: {metric_stderr: the jackknife's standard error} for all metrics, {metric: value} for `_LABEL_SCORES`.
        trivial: {metric: the best score of a constant answer}, on the same documents.
        without_each: {metric: its value without the i-th document, for each i}.
        documents: a digest of the documents, in their order.
        labels: `{"names": […], "confusion": rows of true, columns of predicted labels}`, for tasks that ask the same
            choice in every document.
    """

    scores: dict[str, float] = field(default_factory=dict)
    trivial: dict[str, float] = field(default_factory=dict)
    without_each: dict[str, list[float]] = field(default_factory=dict)
    documents: str = ""
    labels: dict[str, Any] | None = None


def score_samples(task: Task, samples: Sequence[Sample]) -> TaskScores:
    """Scores of `task` from its samples, as `lm_eval.evaluate(log_samples=True)` returns them."""
    with warnings.catch_warnings():
        # scikit-learn warns of classes that occur only among the true or only among the predicted labels; constant
        # answers, and samples without one of them, have such classes
        warnings.simplefilter("ignore")
        return _score_samples(task, samples)


def _score_samples(task: Task, samples: Sequence[Sample]) -> TaskScores:
    found = TaskScores()
    by_filter: dict[str, list[Sample]] = {}
    for sample in samples:
        by_filter.setdefault(sample["filter"], []).append(sample)
    for filter_name, filtered in by_filter.items():
        filtered.sort(key=lambda sample: int(sample["doc_id"]))
        at = "" if filter_name == "none" else f"@{filter_name}"
        for metric in filtered[0]["metrics"]:
            values = [sample[metric] for sample in filtered if metric in sample]
            without_each = _without_each(values, task.aggregation().get(metric, harness_metrics.mean))
            if without_each is not None and len(values) == len(filtered):
                _keep(found, f"{metric}{at}", without_each)
    one_filter = next(iter(by_filter.values()))
    found.documents = hashlib.sha256("".join(str(sample["doc_hash"]) for sample in one_filter).encode()).hexdigest()
    if len(by_filter) == 1:
        _score_labels(found, task, one_filter)
    return found


def _score_labels(found: TaskScores, task: Task, samples: Sequence[Sample]) -> None:
    names = fixed_labels(task, samples)
    gold = [label for sample in samples if (label := _gold(sample, names)) is not None]
    if not names or len(gold) < len(samples):
        return
    # the first of equal likelihoods, as the harness does; requests for mutual information come after the choices
    predicted = [int(np.argmax([answer[0] for answer in sample["filtered_resps"][: len(names)]])) for sample in samples]
    pairs = list(zip(gold, predicted, strict=True))
    constants = [[label] * len(gold) for label in range(len(names))]
    for metric, score in _LABEL_SCORES.items():
        found.trivial[metric] = max(float(score(gold, constant)) for constant in constants)
        found.scores[metric] = float(score(gold, predicted))
        if metric not in found.without_each and len(pairs) > 1:

            def score_of(chosen: Sequence[Any], score: Callable[..., float] = score) -> float:
                return float(score(*zip(*chosen, strict=True)))

            _keep(found, metric, jackknife.scores_without_each(pairs, score_of))
    if "f1" in samples[0]["metrics"]:
        f1 = task.aggregation()["f1"]
        found.trivial["f1"] = max(float(f1(list(zip(gold, constant, strict=True)))) for constant in constants)
    confusion = confusion_matrix(gold, predicted, labels=range(len(names)))
    found.labels = {"names": list(names), "confusion": confusion.tolist()}


def fixed_labels(task: Task, samples: Sequence[Sample]) -> list[str]:
    """The names of a multiple-choice task's labels, if it asks the same choice in every document; else an empty list.

    Choices may begin with something of their document, as multirc's do with the answer; their ends have to be the same.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or not isinstance(task, ConfigurableTask) or task.multiple_input:
        return []
    if isinstance(task.config.doc_to_choice, (list, dict)):
        return [str(choice) for choice in task.doc_to_choice(samples[0]["doc"])]
    endings = set()
    for sample in samples:
        choices = task.doc_to_choice(sample["doc"])
        start = sum(1 for _ in takewhile(lambda same: len(set(same)) == 1, zip(*choices, strict=False)))
        endings.add(tuple(choice[start:] for choice in choices))
        if len(endings) > 1:
            return []
    # one document does not show whether choices differ
    return list(endings.pop()) if len(samples) > 1 else []


def _gold(sample: Sample, names: Sequence[str]) -> int | None:
    target = sample["target"]
    if isinstance(target, str) and target in names:
        target = names.index(target)
    return int(target) if isinstance(target, (int, np.integer)) and 0 <= target < len(names) else None


def _keep(found: TaskScores, metric: str, without_each: jackknife.Values) -> None:
    error = jackknife.standard_error(without_each)
    if error is not None and np.isfinite(without_each).all():
        found.without_each[metric] = without_each.tolist()
        found.scores[f"{metric}_stderr"] = error


def _without_each(values: Sequence[Any], aggregate: Callable[[Any], float]) -> jackknife.Values | None:
    """The metric without each of the documents; None for a metric that may not be smooth."""
    if len(values) < 2:
        return None
    first = values[0]
    if aggregate in (harness_metrics.mean, harness_metrics.perplexity):
        means = jackknife.means_without_each(values)
        return means if aggregate is harness_metrics.mean else np.exp(-means)
    if aggregate in (harness_metrics.weighted_perplexity, harness_metrics.bits_per_byte):
        nats = -jackknife.ratios_without_each([value[0] for value in values], [value[1] for value in values])
        return nats / np.log(2) if aggregate is harness_metrics.bits_per_byte else np.exp(nats)
    labelled = isinstance(first, tuple) and all(isinstance(part, (int, np.integer)) for part in first)
    if labelled and len(set(values)) <= _MOST_DIFFERENT_VALUES:
        return jackknife.scores_without_each(values, lambda others: float(aggregate(others)))
    return None

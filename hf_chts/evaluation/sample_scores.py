"""From the harness's records of single documents: standard errors, scores of classifiers, trivial baselines.

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

from hf_chts.evaluation import jackknife
from hf_chts.evaluation.labels import LABEL_SCORES, confusion_matrix, trivial_score

Sample = dict[str, Any]

# more different values than that are no labels, and to leave each of them out once would take long
_MOST_DIFFERENT_VALUES = 100


@dataclass
class TaskScores:
    """What the records of one task say beyond the harness's own figures.

    Attributes:
        scores: {metric: value, metric_stderr: its jackknife standard error}: errors for all metrics, values only for
            those that the harness does not report.
        trivial: {metric: the best score of always giving one and the same answer}, on the same documents.
        without_each: {metric: its value without the i-th document, for each i}.
        documents: a digest of the documents, in their order.
        labels: `{"names": […], "confusion": [[…]]}`, for tasks that ask the same choice in every document.
    """

    scores: dict[str, float] = field(default_factory=dict)
    trivial: dict[str, float] = field(default_factory=dict)
    without_each: dict[str, list[float]] = field(default_factory=dict)
    documents: str = ""
    labels: dict[str, Any] | None = None


def score_samples(task: Task, samples: Sequence[Sample]) -> TaskScores:
    """Scores of `task` from its samples, as `evaluate(log_samples=True)` returns them."""
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
    gold = [_gold(sample, names) for sample in samples] if names else []
    if not names or any(label is None for label in gold):
        return
    # the first of equal likelihoods, as the harness; behind the choices there may be those for mutual information
    predicted = [int(np.argmax([answer[0] for answer in sample["filtered_resps"][: len(names)]])) for sample in samples]
    pairs = list(zip(gold, predicted, strict=True))

    def matrix(chosen: Sequence[Any]) -> Any:
        return confusion_matrix([pair[0] for pair in chosen], [pair[1] for pair in chosen], len(names))

    confusion = matrix(pairs)
    for metric, score in LABEL_SCORES.items():
        found.trivial[metric] = trivial_score(score, confusion)
        found.scores[metric] = score(confusion)
        if metric not in found.without_each and len(pairs) > 1:

            def score_of(chosen: Sequence[Any], score: Callable[[Any], float] = score) -> float:
                return score(matrix(chosen))

            _keep(found, metric, jackknife.scores_without_each(pairs, score_of))
    if "f1" in samples[0]["metrics"]:
        aggregate = task.aggregation()["f1"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn's, of classes that a constant answer never names
            found.trivial["f1"] = max(
                float(aggregate([(label, constant) for label in gold])) for constant in range(len(names))
            )
    found.labels = {"names": list(names), "confusion": confusion.tolist()}


def fixed_labels(task: Task, samples: Sequence[Sample]) -> list[str]:
    """What a multiple-choice task calls its labels, if it asks the same choice in every document; else nothing.

    Choices that only repeat something of their document before the label (multirc's answers) count as the same.
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
    # a single document cannot tell
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
    """The metric without each of the documents; None for one that is not known to be smooth."""
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn's, of a class that occurs no more
            return jackknife.scores_without_each(values, lambda others: float(aggregate(others)))
    return None

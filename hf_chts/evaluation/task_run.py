"""Running tasks and collecting their results. Imported late, as it imports the harness."""

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval import evaluate
from lm_eval.api.task import Task

from hf_chts.evaluation.harness import RankedHFLM
from hf_chts.evaluation.harness_tasks import LoadedTasks, seeded
from hf_chts.evaluation.sample_scores import score_samples

logger = logging.getLogger(__name__)

_GUESSED = {"acc", "acc_norm", "acc_bytes"}
_FIRST = ("acc", "acc_norm", "mcc", "balanced_acc")


@dataclass
class TaskResults:
    """Dicts by task, with the same meaning as in the result of `evaluate_zero_shot`."""

    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    trivial: dict[str, dict[str, float]] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    num_fewshot: dict[str, int] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)


def run_tasks(
    lm: RankedHFLM, loaded: LoadedTasks, limit: int | None, bootstrap_iters: int, *, progress: bool
) -> TaskResults:
    """Run one task after the other. A task that fails is added to `loaded.skipped`, and the others still run.

    The results are empty on all ranks but the first.

    Raises:
        Exception: no task could be run; on several processes, one task failed.
    """
    result = TaskResults()
    failed: Exception | None = None
    for number, (name, unit) in enumerate(loaded.units.items(), start=1):
        fewest = min(min(len(task.eval_docs), limit or sys.maxsize) for task in unit["tasks"].values())
        if fewest < lm.world_size:
            loaded.skipped[name] = f"it has {fewest} documents for {lm.world_size} processes: start fewer of them"
            continue
        if progress and lm.rank == 0:
            print(f"{name} ({number} of {len(loaded.units)} tasks)", file=sys.stderr, flush=True)
        seeded()
        try:
            raw = evaluate(lm=lm, task_dict=unit, limit=limit, bootstrap_iters=bootstrap_iters)
        except Exception as error:
            if lm.world_size > 1:
                raise  # the other ranks may be well, and would wait for this one for ever
            logger.warning("Task %s failed: %s", name, error, exc_info=True)
            loaded.skipped[name] = f"it failed: {type(error).__name__}: {' '.join(str(error).split())}"
            failed = error
            continue
        if raw is None:
            continue
        for task, entry in raw["results"].items():
            reported = _scores(entry)
            if task in unit["tasks"]:
                try:
                    reported = {**_add_ours(result, unit["tasks"][task], task, raw["samples"], reported), **reported}
                except Exception as error:
                    # the harness's own figures took long to make, and are complete without ours
                    logger.warning("%s has no further scores and errors: %s", task, error, exc_info=True)
            if reported:
                result.tasks[task] = dict(sorted(reported.items(), key=_place))
        result.samples |= {task: count["effective"] for task, count in raw.get("n-samples", {}).items()}
        result.num_fewshot |= raw.get("n-shot", {})
        result.versions |= raw.get("versions", {})
    if not result.tasks and lm.rank == 0:
        raise failed or ValueError(f"No task was run: {loaded.skipped}")
    return result


def _add_ours(
    result: TaskResults, task: Any, name: str, samples: dict[str, Any], reported: dict[str, float]
) -> dict[str, float]:
    """Add to the result what a task's samples show beyond the harness's figures; returns our scores."""
    chance = chance_accuracy(task, samples[name])
    found = score_samples(task, samples[name])
    guessed = {}
    if chance is not None:
        result.chance[name] = chance
        guessed = dict.fromkeys(_GUESSED & {**found.scores, **reported}.keys(), chance)
    result.trivial[name] = {**guessed, **found.trivial}
    if found.labels:
        result.labels[name] = found.labels
    result.documents[name] = {"digest": found.documents, "without_each": found.without_each}
    return found.scores


def chance_accuracy(task: Task, samples: Sequence[dict[str, Any]]) -> float | None:
    """Accuracy of guessing in a multiple-choice task, from the choices of the questions asked; else None."""
    # mutual information doubles the requests of a question
    if task.OUTPUT_TYPE != "multiple_choice" or "acc_mutual_info" in task.aggregation():
        return None
    choices = Counter(len(sample["arguments"]) for sample in samples)
    return sum(count / number for number, count in choices.items()) / choices.total()


def _place(score: tuple[str, float]) -> tuple[int, str]:
    metric = score[0].removesuffix("_stderr")
    return (_FIRST.index(metric) if metric in _FIRST else len(_FIRST), score[0])


def _scores(entry: dict[str, Any]) -> dict[str, float]:
    """The harness's {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...} as {"acc": 0.5, "acc_stderr": 0.1}."""
    scores = {}
    for key, value in entry.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or not isinstance(value, (int, float)):
            continue  # not a metric, or "N/A" for an unknown standard error
        base = metric.removesuffix("_stderr")
        at = "" if filter_name == "none" else f"@{filter_name}"
        scores[f"{base}{at}{'_stderr' if base != metric else ''}"] = float(value)
    return scores

"""Suites: names for lists of lm-eval tasks, and averages over the tasks of a suite."""

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any

from hf_chts.evaluation.embedded_suite import EMBEDDED_TASKS

SUITES: dict[str, tuple[str, ...]] = {
    "embedded": EMBEDDED_TASKS,
    "glue": ("cola", "mnli", "mnli_mismatch", "mrpc", "qnli", "qqp", "rte", "sst2", "wnli"),
    "superglue": ("boolq", "cb", "copa", "multirc", "record", "wic", "wsc", "sglue_rte"),
    "commonsense": (
        "hellaswag",
        "piqa",
        "arc_easy",
        "arc_challenge",
        "winogrande",
        "openbookqa",
        "boolq",
        "lambada_openai",
    ),
    "perplexity": ("wikitext",),
}
AVERAGED = ("acc", "mcc", "balanced_acc")

Scores = Mapping[str, Mapping[str, float]]


def suite_tasks(suite: str) -> list[str]:
    """The names of the tasks in `suite`, a comma-separated list of suites and tasks; each name once.

    Names of tasks are checked by `check_task_names`.

    Raises:
        ValueError: `suite` has an empty name.
    """
    names = [name.strip() for name in suite.split(",")]
    if not all(names):
        raise ValueError(
            f"suite={suite!r} has an empty name: use one of {', '.join(SUITES)}, or task names separated by commas."
        )
    return list(dict.fromkeys(task for name in names for task in SUITES.get(name, (name,))))


def check_task_names(tasks: Collection[str], known: Collection[str]) -> None:
    """Raise ValueError for the first of `tasks` that is not in `known`, with the suites and the closest names."""
    for task in tasks:
        if task not in known:
            close = difflib.get_close_matches(task, [*SUITES, *known], n=4)
            hint = f" Closest: {', '.join(close)}." if close else ""
            raise ValueError(
                f"{task!r} is neither a suite ({', '.join(SUITES)}) nor a task of the lm-eval harness.{hint}"
            )


def suite_averages(
    suite: str, tasks: Scores, trivial: Scores, *, among: Collection[str] | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """The mean over the tasks of each suite in `suite`; every task counts the same.

    Args:
        suite: what was evaluated: names of suites and tasks, separated by commas; only suites have averages.
        tasks, trivial: as `evaluate_zero_shot` returns them.
        among: average over these tasks only, such as those that another model has run too.

    Returns:
        {suite: {metric: {"value", "stderr", "trivial", "tasks"}}} for accuracy, Matthews correlation and balanced
        accuracy, if two or more tasks have them. `stderr` assumes that the tasks are independent; it and `trivial` are
        None if they are missing for one of the tasks.
    """
    averages: dict[str, dict[str, dict[str, Any]]] = {}
    for name in dict.fromkeys(part.strip() for part in suite.split(",")):
        for metric in AVERAGED:
            having = [task for task in SUITES.get(name, ()) if metric in tasks.get(task, {})]
            having = [task for task in having if among is None or task in among]
            if len(having) < 2:
                continue
            averages.setdefault(name, {})[metric] = {
                "value": _mean([tasks[task][metric] for task in having]),
                "stderr": error_of_mean([tasks[task].get(f"{metric}_stderr") for task in having]),
                "trivial": _mean([trivial.get(task, {}).get(metric) for task in having]),
                "tasks": having,
            }
    return averages


def error_of_mean(errors: list[float | None]) -> float | None:
    """The standard error of the mean of independent figures with these errors; None if one is unknown."""
    squares = [error**2 for error in errors if error is not None]
    return math.sqrt(sum(squares)) / len(errors) if len(squares) == len(errors) else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(values) if len(known) == len(values) else None

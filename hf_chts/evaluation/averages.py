"""Averages over the tasks of a suite."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from hf_chts.evaluation.suites import SUITES

AVERAGED = ("acc", "mcc", "balanced_acc")

Scores = Mapping[str, Mapping[str, float]]


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

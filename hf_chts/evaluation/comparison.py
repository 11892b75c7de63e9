"""Several models on the same tasks: how much they differ, and whether that is more than chance."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_chts.evaluation import jackknife
from hf_chts.evaluation.suites import error_of_mean, suite_averages

# about 95% of a normal distribution
ERRORS_OUTSIDE = 2.0

Result = Mapping[str, Any]


def compare_models(results: Sequence[Result], baseline: str | None = None) -> list[dict[str, Any]]:
    """Copies of `results` with the differences to the first, or to the one whose `model` is `baseline`.

    Returns:
        The results; all but the baseline's have `difference`: {"baseline": its model, "tasks": {task: {metric:
        {"value", "stderr", "paired", "outside"}}}, "averages": {suite: {metric: the same and "tasks"}}}.

        - `value`: this model's minus the baseline's.
        - `stderr`: paired, from the differences document by document, if both models were asked the same documents and
          the results have `without_each`; else the root of the sum of the squares; None if an error is unknown.
        - `outside`: whether the value is more than 2 standard errors from 0; None without an error.

        Averages are over the tasks that all results have.

    Raises:
        ValueError: not exactly one result has `baseline` as its model.
    """
    reference = baseline_index([str(result["model"]) for result in results], baseline)
    common = common_tasks(results)
    compared = []
    for i, result in enumerate(results):
        extended = dict(result)
        extended.pop("difference", None)
        if i != reference:
            extended["difference"] = _differences(result, results[reference], common)
        compared.append(extended)
    return compared


def baseline_index(models: Sequence[str], baseline: str | None) -> int:
    """The index of `baseline` in `models`; 0 for None."""
    if baseline is None:
        return 0
    found = [i for i, model in enumerate(models) if model.rstrip("/") == baseline.rstrip("/")]
    if len(found) != 1:
        raise ValueError(f"baseline={baseline!r}: name a model that occurs once among {', '.join(models)}.")
    return found[0]


def common_tasks(results: Sequence[Result]) -> list[str]:
    """The tasks that all results have, in the order of the first."""
    return [task for task in results[0]["tasks"] if all(task in result["tasks"] for result in results)]


def _differences(result: Result, reference: Result, common: Sequence[str]) -> dict[str, Any]:
    tasks: dict[str, dict[str, dict[str, Any]]] = {}
    for task, scores in result["tasks"].items():
        others = reference["tasks"].get(task, {})
        for metric in scores:
            if not metric.endswith("_stderr") and metric in others:
                tasks.setdefault(task, {})[metric] = _difference(result, reference, task, metric)
    averages: dict[str, dict[str, dict[str, Any]]] = {}
    own = suite_averages(result.get("suite", ""), result["tasks"], result.get("trivial", {}), among=common)
    for suite, metrics in own.items():
        for metric, average in metrics.items():
            parts = [tasks[task].get(metric) for task in average["tasks"]]
            known = [part for part in parts if part is not None and part["value"] is not None]
            if len(known) == len(parts):
                value = sum(part["value"] for part in known) / len(known)
                error = error_of_mean([part["stderr"] for part in known])
                judged = _judged(value, error, all(part["paired"] for part in known))
                averages.setdefault(suite, {})[metric] = {**judged, "tasks": average["tasks"]}
    return {"baseline": reference["model"], "tasks": tasks, "averages": averages}


def _difference(result: Result, reference: Result, task: str, metric: str) -> dict[str, Any]:
    mine, theirs = result["tasks"][task], reference["tasks"][task]
    if mine[metric] is None or theirs[metric] is None:  # not finite, read from a file
        return _judged(None, None, False)
    value = mine[metric] - theirs[metric]
    documents = [side.get("documents", {}).get(task, {}) for side in (result, reference)]
    series = [record.get("without_each", {}).get(metric) for record in documents]
    if None not in series and documents[0]["digest"] == documents[1]["digest"]:
        pairs = zip(*series, strict=True)
        return _judged(value, jackknife.standard_error([a - b for a, b in pairs]), True)
    errors = [side.get(f"{metric}_stderr") for side in (mine, theirs)]
    known = [error for error in errors if error is not None]
    return _judged(value, math.hypot(*known) if len(known) == 2 else None, False)


def _judged(value: float | None, error: float | None, paired: bool) -> dict[str, Any]:
    outside = None if value is None or error is None else bool(abs(value) > ERRORS_OUTSIDE * error)
    return {"value": value, "stderr": error, "paired": paired, "outside": outside}

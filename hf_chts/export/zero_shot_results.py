"""Zero-shot results in a model card: finding a model's in a file of results, and showing them.

The file is what `eval_zero_shot.py --output` writes: a list with a dict for each model. Such a dict needs only `tasks`,
{task: {metric: value, metric_stderr: its standard error}}.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from hf_chts.export.card_metadata import TASK, is_figure
from hf_chts.files.atomic import finite_or_null
from hf_chts.markdown import environment

RESULTS_NAME = "zero_shot.json"  # beside the weights
TITLE = "Zero-shot"

_STDERR = "_stderr"


def read_results(path: Path, names: Iterable[str] = ()) -> dict[str, Any]:
    """The results of one model.

    Args:
        path: a JSON file with the results of one or several models.
        names: directories or Hub ids that the model may be called in it; needed only where it has several models.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no results, or several models' and not exactly one of them has one of the names.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there are no zero-shot results at {path}: write some with eval_zero_shot.py --output")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file of zero-shot results: {error}") from error
    results = content if isinstance(content, list) else [content]
    if not results or not all(_is_result(result) for result in results):
        raise ValueError(
            f"{path} holds no zero-shot results: each has tasks with their metrics, as eval_zero_shot.py writes them"
        )
    if len(results) == 1:
        return dict(results[0])
    wanted = {_place(name) for name in names}
    own = [result for result in results if _place(str(result.get("model", ""))) in wanted]
    if len(own) != 1:
        models = ", ".join(str(result.get("model", "?")) for result in results)
        raise ValueError(
            f"{path} has the results of {len(results)} models ({models}), and {len(own)} of them are of "
            f"{' or '.join(names)}: name a file with the results of this model"
        )
    return dict(own[0])


def results_section(result: Mapping[str, Any]) -> str:
    """A Markdown table with a row for each task and metric, and below it what a reader has to know."""
    templates = environment("hf_chts.export")
    templates.filters["figure"] = lambda value: f"{value:.4f}" if is_figure(value) else "not finite"
    templates.tests["figure"] = is_figure
    rows = [
        {"task": task, "metric": metric, "value": value, "stderr": stderr, "trivial": _trivial(result, task, metric)}
        for task, metric, value, stderr in _values(result)
    ]
    text = templates.get_template("zero_shot.md.jinja").render(
        rows=rows,
        limit=(result.get("config") or {}).get("limit"),
        skipped=result.get("skipped") or {},
        harness=(result.get("versions") or {}).get("lm_eval"),
    )
    return text.rstrip()


def eval_results(result: Mapping[str, Any]) -> list[EvalResult]:
    """The same figures for the `model-index`."""
    shots = (result.get("config") or {}).get("num_fewshot")
    found = []
    for task, metric, value, stderr in _values(result):
        if not is_figure(value):
            continue
        further = {"stderr": stderr} if is_figure(stderr) else {}
        if isinstance(shots, Mapping) and task in shots:
            further["num_fewshot"] = shots[task]
        found.append(
            EvalResult(
                task_type=TASK,
                dataset_type=task,
                dataset_name=task,
                metric_type=metric,
                metric_value=value,
                metric_args=further or None,
            )
        )
    return found


def published(result: Mapping[str, Any]) -> bytes:
    """The JSON file of one model's results to publish: without local paths and the scores of single documents.

    Figures that are not finite become null.
    """
    kept = {name: value for name, value in result.items() if name not in ("data", "documents")}
    model = kept.get("model")
    if isinstance(model, str) and Path(model).is_absolute():
        kept["model"] = Path(model).name
    return (json.dumps([finite_or_null(kept)], indent=2, allow_nan=False) + "\n").encode()


def _trivial(result: Mapping[str, Any], task: str, metric: str) -> float | None:
    levels = (result.get("trivial") or {}).get(task)
    level = levels.get(metric) if isinstance(levels, Mapping) else None
    if level is None and metric.startswith("acc"):
        level = (result.get("chance") or {}).get(task)
    return level if is_figure(level) else None


def _values(result: Mapping[str, Any]) -> list[tuple[str, str, Any, Any]]:
    """(task, metric, value, standard error or None)"""
    return [
        (task, metric, value, scores.get(f"{metric}{_STDERR}"))
        for task, scores in result["tasks"].items()
        for metric, value in scores.items()
        if not metric.endswith(_STDERR) and not isinstance(value, str | Mapping | list)
    ]


def _is_result(result: Any) -> bool:
    tasks = result.get("tasks") if isinstance(result, dict) else None
    return isinstance(tasks, dict) and all(isinstance(scores, dict) for scores in tasks.values())


def _place(name: str) -> str:
    """The absolute path of a directory; a Hub id as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name

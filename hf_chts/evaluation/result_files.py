"""Results on disk: JSON, Markdown and a figure, each written whole or not at all."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_chts.evaluation.comparison import compare_models
from hf_chts.evaluation.tables import results_table
from hf_chts.files.atomic import finite_or_null
from hf_chts.machine import check_can_write
from hf_chts.markdown import picture


def write_results(results: Sequence[dict[str, Any]], path: Path, *, baseline: str | None = None) -> None:
    """Write `results` as a JSON list, replacing `path` in one step; figures that are not finite become null.

    Each item is what `evaluate_zero_shot` returned, without `documents`, and with `difference` as `compare_models`
    describes it, where it is not of the baseline.
    """
    text = results_json(compare_models(results, baseline) if results else [])
    _replace(path, lambda unfinished: unfinished.write_text(f"{text}\n", encoding="utf-8"))


def results_json(results: Sequence[dict[str, Any]]) -> str:
    """Results as `write_results` writes them, without the line break at the end."""
    kept = [{key: value for key, value in result.items() if key != "documents"} for result in results]
    return json.dumps(finite_or_null(kept), indent=2, allow_nan=False, default=_plain)


def write_report(results: Sequence[dict[str, Any]], path: Path, *, baseline: str | None = None) -> tuple[Path, Path]:
    """Write a Markdown table and a figure of `results` beside `path`, the JSON file; returns where they are."""
    from hf_chts.evaluation.figure import results_figure  # training needs this package without matplotlib's import

    markdown, figure = report_paths(path)
    table = results_table(results, style="markdown", baseline=baseline)
    _replace(figure, lambda unfinished: results_figure(results, unfinished))
    text = f"# Results\n\n{table}\n\n{picture('Scores, with their standard errors', figure.name)}\n"
    _replace(markdown, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
    return markdown, figure


def report_paths(path: Path) -> tuple[Path, Path]:
    """Where the Markdown table and the figure beside the JSON file `path` go.

    Raises:
        ValueError: one of them would be `path` itself.
    """
    stem = path.name.removesuffix(".json")
    paths = path.with_name(f"{stem}.md"), path.with_name(f"{stem}.png")
    if path.suffix in (".md", ".png"):
        raise ValueError(
            f"{path} is for the JSON file: name it {path.stem}.json, {path.stem}.md and .png go beside it."
        )
    return paths


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_output(path: Path) -> None:
    """That results can be written to `path`, and table and figure beside it; nothing is left behind.

    Raises:
        OSError: they cannot.
        ValueError: one of them would be `path` itself.
    """
    for each in (path, *report_paths(path)):
        if each.is_dir():
            raise IsADirectoryError(f"{each} is a directory: name a file for the results with --output.")
    check_can_write(path.parent, "the folder of the results")


def _plain(value: Any) -> Any:
    """What JSON has no word for, as the version of a task that YAML reads as a date, as a number or as text."""
    return finite_or_null(value.item()) if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)

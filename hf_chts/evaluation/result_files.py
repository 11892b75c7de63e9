"""Results on disk: JSON, Markdown and a figure."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_chts.evaluation.comparison import compare_models
from hf_chts.evaluation.tables import results_table
from hf_chts.files.atomic import finite_or_null, whole_file, write_whole
from hf_chts.machine import check_can_write
from hf_chts.markdown import picture


def write_results(results: Sequence[dict[str, Any]], path: Path, *, baseline: str | None = None) -> None:
    """Write `results` as a JSON list; numbers that are not finite become null.

    Each item is what `evaluate_zero_shot` returned, without `documents` and with the `difference` of `compare_models`.
    """
    write_whole(path, results_json(compare_models(results, baseline) if results else []) + "\n")


def results_json(results: Sequence[dict[str, Any]]) -> str:
    """The JSON that `write_results` writes, without the line break at the end."""
    kept = [{key: value for key, value in result.items() if key != "documents"} for result in results]
    return json.dumps(finite_or_null(kept), indent=2, allow_nan=False, default=_plain)


def write_report(results: Sequence[dict[str, Any]], path: Path, *, baseline: str | None = None) -> tuple[Path, Path]:
    """Write a Markdown table and a figure of `results` next to the JSON file `path`; returns their paths."""
    from hf_chts.evaluation.figure import results_figure  # late, because results need no matplotlib

    markdown, figure = report_paths(path)
    table = results_table(results, style="markdown", baseline=baseline)
    with whole_file(figure) as file:
        results_figure(results, file.name)
    text = f"# Results\n\n{table}\n\n{picture('Scores, with their standard errors', figure.name)}\n"
    write_whole(markdown, text)
    return markdown, figure


def report_paths(path: Path) -> tuple[Path, Path]:
    """The paths of the Markdown table and the figure next to the JSON file `path`.

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


def check_output(path: Path) -> None:
    """Check that results can be written to `path`, and table and figure next to it; leaves no file behind.

    Raises:
        OSError: they cannot be written.
        ValueError: one of them would be `path` itself.
    """
    for each in (path, *report_paths(path)):
        if each.is_dir():
            raise IsADirectoryError(f"{each} is a directory: name a file for the results with --output.")
    check_can_write(path.parent, "the folder of the results")


def _plain(value: Any) -> Any:
    """A number or text for what JSON does not know, such as a task's version that YAML reads as a date."""
    return finite_or_null(value.item()) if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)

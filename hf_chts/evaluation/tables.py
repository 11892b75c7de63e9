"""Results of `evaluate_zero_shot` for one or several models: a table side by side, and a JSON file."""

import json
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

_MISSING = "–"
_WIDEST_NAME = 28


def results_table(
    results: Sequence[dict[str, Any]], *, style: Literal["text", "markdown"] = "text", width: int = 100
) -> str:
    """A table with a row per task and metric, and a column per model: value ± standard error.

    `chance` is the accuracy of guessing, where known. Below the table it says what a reader has to know before
    comparing columns: tasks left out, limits, task versions that differ.

    Args:
        results: what `evaluate_zero_shot` returned, or what `write_results` wrote of it, one per model.
        style: "text", in blocks of as many models as fit into `width` characters; or "markdown", one table.
        width: characters per line of text.

    Raises:
        ValueError: no results, or another style.
    """
    if not results:
        raise ValueError("There are no results to make a table of.")
    if style not in ("text", "markdown"):
        raise ValueError(f"style={style!r}: use 'text' or 'markdown'.")
    rows = _rows(results)
    heads = [["task", "metric", "chance"], *([task, metric, _chance(results, task, metric)] for task, metric in rows)]
    columns = [
        [name, *(_value(result, task, metric) for task, metric in rows)]
        for name, result in zip(column_names([result["model"] for result in results]), results, strict=True)
    ]
    if style == "markdown":
        table = _markdown([head + [column[i] for column in columns] for i, head in enumerate(heads)])
    else:
        table = "\n\n".join(_text(heads, block) for block in _blocks(heads, columns, width))
    notes = _notes(results, width if style == "text" else None)
    return "\n".join([table, *([""] if notes else []), *notes])


def write_results(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Write `results` as a JSON list, replacing `path` in one step; figures that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(_finite(list(results)), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def column_names(models: Sequence[str]) -> list[str]:
    """Short, distinct names: as many of the last parts of each path as tell it from the others, cut in the middle."""
    parts = [model.rstrip("/").split("/") for model in models]
    depth, deepest = 1, max(map(len, parts), default=1)
    names = _last(parts, depth)
    while len(set(names)) < len(names) and depth < deepest:
        depth += 1
        names = _last(parts, depth)
    half = _WIDEST_NAME // 2
    names = [name if len(name) <= _WIDEST_NAME else f"{name[: half - 1]}…{name[-half:]}" for name in names]
    if len(set(names)) < len(names):
        names = [f"{i}: {name}" for i, name in enumerate(names, start=1)]
    return names


def _last(parts: list[list[str]], depth: int) -> list[str]:
    return ["/".join(part[-depth:]) for part in parts]


def _rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return list(
        dict.fromkeys(
            (task, metric)
            for result in results
            for task, scores in result["tasks"].items()
            for metric in scores
            if not metric.endswith("_stderr")
        )
    )


def _chance(results: Sequence[dict[str, Any]], task: str, metric: str) -> str:
    if metric not in ("acc", "acc_norm", "acc_bytes"):
        return ""
    levels = {result["chance"][task] for result in results if task in result["chance"]}
    # with different limits the models got different questions
    return f"{levels.pop():.4f}" if len(levels) == 1 else ""


def _value(result: dict[str, Any], task: str, metric: str) -> str:
    scores = result["tasks"].get(task, {})
    if metric not in scores:
        return _MISSING
    stderr = scores.get(f"{metric}_stderr")
    return _figure(scores[metric]) + (f" ± {_figure(stderr)}" if stderr is not None else "")


def _figure(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3e}"


def _blocks(heads: list[list[str]], columns: list[list[str]], width: int) -> list[list[list[str]]]:
    taken = sum(max(map(len, cells)) + 2 for cells in zip(*heads, strict=True))
    blocks: list[list[list[str]]] = []
    room = 0
    for column in columns:
        needed = max(map(len, column)) + 2
        if not blocks or needed > room:
            blocks.append([])
            room = width - taken + 2
        blocks[-1].append(column)
        room -= needed
    return blocks


def _text(heads: list[list[str]], columns: list[list[str]]) -> str:
    lines = [head + [column[i] for column in columns] for i, head in enumerate(heads)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    lines.insert(1, ["─" * width for width in widths])
    # a task is named in its first row only
    shown = ["", *(line[0] for line in lines)]
    return "\n".join(
        "  ".join(
            cell.ljust(width)
            for cell, width in zip(["" if line[0] == above else line[0], *line[1:]], widths, strict=True)
        ).rstrip()
        for line, above in zip(lines, shown, strict=False)
    )


def _markdown(lines: list[list[str]]) -> str:
    rule = ["---"] * 3 + ["---:"] * (len(lines[0]) - 3)
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [escaped[0], rule, *escaped[1:]])


def _notes(results: Sequence[dict[str, Any]], width: int | None) -> list[str]:
    notes = []
    limits = {result["config"]["limit"] for result in results}
    if limits != {None}:
        given = ", ".join("all" if limit is None else str(limit) for limit in sorted(limits, key=str))
        notes.append(f"Only the first documents of each task were used (limit: {given}).")
    versions: dict[str, set[str]] = {}
    for result in results:
        for task, version in result["versions"]["tasks"].items():
            versions.setdefault(task, set()).add(str(version))
    notes += [
        f"{task} is not the same in all columns: versions {', '.join(sorted(found))}."
        for task, found in versions.items()
        if len(found) > 1
    ]
    skipped: dict[str, dict[str, None]] = {}
    for result in results:
        for task, reason in result["skipped"].items():
            skipped.setdefault(reason, {})[task] = None
    notes += [f"Skipped {', '.join(tasks)}: {reason}" for reason, tasks in skipped.items()]
    return notes if width is None else [line for note in notes for line in textwrap.wrap(note, width)]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

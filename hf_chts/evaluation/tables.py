"""Results of `evaluate_zero_shot` for one or several models, side by side in a table."""

import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from hf_chts.evaluation.comparison import baseline_index, common_tasks, compare_models
from hf_chts.evaluation.suites import suite_averages
from hf_chts.markdown import inline
from hf_chts.names import column_names
from hf_chts.text_table import text_table

_MISSING = "–"
_NOT_BEATEN, _OUTSIDE = "·", "*"
_NAME_WIDTHS = (28, 20, 16, 13)

Row = tuple[str, str]
Column = list[str]


def results_table(
    results: Sequence[dict[str, Any]],
    *,
    style: Literal["text", "markdown"] = "text",
    width: int = 100,
    baseline: str | None = None,
) -> str:
    """A table with a row for each task and metric, and for each model a column of value±standard error.

    With several models, each but the baseline has a second column: its difference from the baseline, with a * if that
    is more than 2 standard errors. `trivial` is the best score of always the same answer, or of guessing; a · marks
    values that do not exceed it by more than their standard error. Notes below the table say what the marks mean, and
    what a reader has to know before comparing columns: tasks left out, limits, versions that differ.

    Args:
        results: what `evaluate_zero_shot` returned, or what `write_results` wrote of it, one per model.
        style: "text", in blocks of as many models as fit into `width` characters; or "markdown", one table.
        width: characters per line of text.
        baseline: the `model` of the result that the others are compared with; None: the first.

    Raises:
        ValueError: there are no results, the style is unknown, or the baseline is not among the models.
    """
    if not results:
        raise ValueError("There are no results to make a table of.")
    if style not in ("text", "markdown"):
        raise ValueError(f"style={style!r}: use 'text' or 'markdown'.")
    models = [result["model"] for result in results]
    reference = baseline_index(models, baseline)
    entries = [_entries(result, common_tasks(results)) for result in compare_models(results, baseline)]
    rows = list(dict.fromkeys(row for entry in entries for row in entry))
    heads = [
        ["task", "metric", "trivial"],
        *([task, metric, _trivial(entries, (task, metric))] for task, metric in rows),
    ]
    for widest in _NAME_WIDTHS:
        groups = [
            _columns(name, entry, rows, compared=i != reference)
            for i, (name, entry) in enumerate(zip(column_names(models, widest), entries, strict=True))
        ]
        blocks = _blocks(heads, groups, width)
        if len(blocks) == 1:
            break
    if style == "markdown":
        table = _markdown([head + [cells[i] for group in groups for cells in group] for i, head in enumerate(heads)])
    else:
        table = "\n\n".join(_text(heads, block) for block in blocks)
    notes = [*_legend(entries, models[reference]), *_notes(results)]
    lines = (
        list(map(inline, notes))
        if style == "markdown"
        else [line for note in notes for line in textwrap.wrap(note, width)]
    )
    separator = "\n\n" if style == "markdown" else "\n"
    return table + ("\n\n" + separator.join(lines) if lines else "")


def _entries(result: dict[str, Any], common: Sequence[str]) -> dict[Row, dict[str, Any]]:
    """{(task, metric): value, stderr, trivial and difference}, first of the tasks, then of the averages."""
    entries: dict[Row, dict[str, Any]] = {}
    difference = result.get("difference", {"tasks": {}, "averages": {}})
    trivial = result.get("trivial", {})
    for task, scores in result["tasks"].items():
        for metric in scores:
            if not metric.endswith("_stderr"):
                entries[task, metric] = {
                    "value": scores[metric],
                    "stderr": scores.get(f"{metric}_stderr"),
                    "trivial": trivial.get(task, {}).get(metric),
                    "difference": difference["tasks"].get(task, {}).get(metric),
                }
    averages = suite_averages(result.get("suite", ""), result["tasks"], trivial, among=common)
    for suite, metrics in averages.items():
        for metric, average in metrics.items():
            entries[f"{suite}: mean of {len(average['tasks'])}", metric] = {
                **average,
                "difference": difference["averages"].get(suite, {}).get(metric),
            }
    return entries


def beats_trivial(value: float | None, error: float | None, trivial: float | None) -> bool:
    """Whether a score exceeds the trivial one by more than its standard error; True if no trivial one is known."""
    return trivial is None or value is None or value - trivial > (error or 0.0)


def _columns(name: str, entries: dict[Row, dict[str, Any]], rows: Sequence[Row], *, compared: bool) -> list[Column]:
    values, differences = [name], ["difference"]
    for row in rows:
        entry = entries.get(row)
        if entry is None:
            values.append(_MISSING)
            differences.append("")
            continue
        beaten = beats_trivial(entry["value"], entry["stderr"], entry["trivial"])
        values.append(_figure(entry["value"], entry["stderr"]) + ("" if beaten else _NOT_BEATEN))
        found = entry["difference"]
        mark = _OUTSIDE if found and found["outside"] else ""
        differences.append(_figure(found["value"], found["stderr"], sign="+") + mark if found else "")
    return [values, differences] if compared else [values]


def _trivial(entries: Sequence[dict[Row, dict[str, Any]]], row: Row) -> str:
    levels = {entry[row]["trivial"] for entry in entries if row in entry}
    # models with different limits were asked different questions
    level = levels.pop() if len(levels) == 1 else None
    return "" if level is None else f"{level:.4f}"


def _figure(value: float | None, error: float | None, *, sign: Literal["-", "+"] = "-") -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    # five digits of the larger of the two, so that the columns stay narrow
    size = max(abs(value), error or 0.0)
    large = "3e" if error is None else "1e"
    form = large if size >= 1e4 else f"{4 - sum(size >= limit for limit in (10, 100, 1000))}f"
    return f"{value:{sign}.{form}}" + ("" if error is None else f"±{error:.{form}}")


def _blocks(heads: list[list[str]], groups: list[list[Column]], width: int) -> list[list[Column]]:
    taken = sum(max(map(len, cells)) + 2 for cells in zip(*heads, strict=True))
    blocks: list[list[Column]] = []
    room = 0
    for group in groups:
        needed = sum(max(map(len, column)) + 2 for column in group)
        if not blocks or needed > room:
            blocks.append([])
            room = width - taken + 2
        blocks[-1] += group
        room -= needed
    return blocks


def _text(heads: list[list[str]], columns: list[Column]) -> str:
    header, *lines = [head + [column[i] for column in columns] for i, head in enumerate(heads)]
    # a task is named in its first row only
    shown = [["" if line[0] == above[0] else line[0], *line[1:]] for above, line in pairwise([header, *lines])]
    return "\n".join(text_table(shown, header))


def _markdown(lines: list[list[str]]) -> str:
    rule = ["---"] * 2 + ["---:"] * (len(lines[0]) - 2)
    escaped = [[inline(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [escaped[0], rule, *escaped[1:]])


def _legend(entries: Sequence[dict[Row, dict[str, Any]]], baseline: str) -> list[str]:
    every = [(row, value) for entry in entries for row, value in entry.items()]
    legend = []
    if any(value["trivial"] is not None for _, value in every):
        legend.append(
            "trivial: the best score of one and the same answer to everything (for acc, the majority class's), or of "
            f"guessing where choices differ from question to question. {_NOT_BEATEN} not above it by more than one "
            "standard error."
        )
    differences = [(row, value["difference"]) for row, value in every if value["difference"]]
    if differences:
        unpaired = list(dict.fromkeys(row[0] for row, found in differences if not found["paired"]))
        text = f"difference: to {baseline}, ± its standard error"
        text += ", paired document by document" if len(unpaired) < len({row[0] for row, _ in differences}) else ""
        if unpaired:
            text += f" (not paired: {', '.join(unpaired)})"
        legend.append(f"{text}. {_OUTSIDE} more than 2 standard errors from 0.")
    return legend


def _sizes(results: Sequence[dict[str, Any]]) -> list[str]:
    """How many parameters each of several models has, and which is a baseline; nothing of results without them."""
    if len(results) < 2:
        return []
    sizes = []
    for result in results:
        config = result["config"]
        if "nonzero_parameters" in config:
            whole, nonzero = config["parameters"], config["nonzero_parameters"]
            text = f"{result['model']} {nonzero:,}" + (f" of {whole:,}" if nonzero != whole else "")
            sizes.append(text + (f" (dense baseline, {config['baseline']})" if config.get("baseline") else ""))
    return [f"Parameters without missing links: {'; '.join(sizes)}."] if sizes else []


def _notes(results: Sequence[dict[str, Any]]) -> list[str]:
    notes = _sizes(results)
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
    local = list(dict.fromkeys(task for result in results for task in result.get("data", {})))
    if local:
        notes.append(f"From local data files: {', '.join(local)}.")
    skipped: dict[str, dict[str, None]] = {}
    for result in results:
        for task, reason in result["skipped"].items():
            skipped.setdefault(reason, {})[task] = None
    return notes + [f"Skipped {', '.join(tasks)}: {reason}" for reason, tasks in skipped.items()]

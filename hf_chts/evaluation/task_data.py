"""Tasks of the harness on local data files: its prompts and scores without a network.

A file is DIR/<task>/<split>.jsonl, such as DIR/rte/validation.jsonl, or in a clone of the Hub's repository, such as
DIR/glue/rte/validation-00000-of-00001.parquet. Splits have their names on the Hub (mnli: validation_matched). Files are
.jsonl, .json, .csv (each also .gz) or .parquet.
"""

import csv
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow.parquet
import yaml

from hf_chts.evaluation.task_columns import COLUMNS, checked_row

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")

# tasks on another split of a data set that is called after its first task
_SHARED = {"mnli_mismatch": "mnli"}


def task_folder(directory: Path, task: str, config: dict[str, Any]) -> Path | None:
    """The folder with the data of `task`, whose definition in the harness is `config`; None if there is none."""
    repository = str(config.get("dataset_path") or task).rsplit("/", 1)[-1]
    names = [task, f"{repository}/{config.get('dataset_name') or '.'}", _SHARED.get(task, task)]
    return next((directory / name for name in names if (directory / name).is_dir()), None)


def expected_file(task: str, config: dict[str, Any]) -> str:
    """The file with the questions of `task`, under the directory of all data."""
    return f"{task}/{_evaluated_split(config)}.jsonl"


def write_local_task(
    task: str, definition: Path, config: dict[str, Any], folder: Path, written: Path, *, num_fewshot: int | None = None
) -> Path:
    """Write a definition of `task` that reads the files in `folder`, for `TaskManager.load`; returns its path.

    Args:
        definition: the harness's own YAML file of the task, and `config` its contents.
        written: a directory for the new definition and the checked data.
        num_fewshot: examples before each question; None for the task's own number.

    Raises:
        FileNotFoundError: `folder` lacks a split that is needed.
        ValueError: a file cannot be read, or a row lacks a column or has a value of another kind than the data set.
    """
    evaluated = _evaluated_split(config)
    changes: dict[str, Any] = {"training_split": None, "validation_split": None, "test_split": None}
    changes["test_split" if config.get("test_split") else "validation_split"] = evaluated
    own_shots = config.get("num_fewshot")
    shots = own_shots if num_fewshot is None or own_shots == 0 else num_fewshot
    named = config.get("fewshot_split") or (config.get("fewshot_config") or {}).get("split")
    examples = named or config.get("training_split") or config.get("validation_split")
    splits = {evaluated: evaluated}
    if shots and examples:
        splits[examples] = examples
        if not named:
            changes["training_split" if config.get("training_split") else "validation_split"] = examples
    elif named:
        splits[named] = evaluated  # the harness loads this split, but uses no example of it
    home = written / task
    home.mkdir(parents=True)
    for split in dict.fromkeys(splits.values()):
        rows = list(_rows(folder, split, task))
        if not rows:
            raise ValueError(f"{folder}/{split}.* has no rows")
        try:
            datasets.Dataset.from_list(rows).to_parquet(home / f"{split}.parquet")
        except (ValueError, TypeError, OverflowError) as error:  # pyarrow's errors are ValueErrors
            raise ValueError(f"the rows of {folder}/{split}.* have different kinds of values: {error}") from error
    contents = {
        "include": str(definition),
        "task": task,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(home / f"{file}.parquet") for split, file in splits.items()},
            "cache_dir": str(home / "cache"),
        },
        **changes,
    }
    path = home / f"{task}.yaml"
    path.write_text(yaml.safe_dump(contents, sort_keys=False), encoding="utf-8")
    return path


def _evaluated_split(config: dict[str, Any]) -> str:
    return str(config.get("test_split") or config.get("validation_split"))


def _rows(folder: Path, split: str, task: str) -> Iterator[dict[str, Any]]:
    for path in _files(folder, split):
        columns = COLUMNS.get(task)
        for number, row in enumerate(_read(path), start=1):
            if not isinstance(row, dict):
                raise ValueError(f"{path}, row {number} is {row!r}: a row is an object with a value for each column")
            try:
                yield checked_row(row, columns) if columns else row
            except ValueError as error:
                raise ValueError(f"{path}, row {number}: {error}") from None


def _files(folder: Path, split: str) -> list[Path]:
    whole = [path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
    if len(whole) > 1:
        raise ValueError(f"{folder} has {' and '.join(path.name for path in whole)}: leave one of them")
    # as repositories on the Hub name them
    shards = sorted(path for suffix in SUFFIXES for path in folder.glob(f"{split}-[0-9]*{suffix}"))
    if not whole and not shards:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{folder} has no {split}.jsonl (nor {', '.join(SUFFIXES[1:])}); there is {there}. "
            "Splits have the names that they have on the Hub"
        )
    return whole or shards


def _read(path: Path) -> Iterator[dict[str, Any]]:
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    try:
        if kind == "parquet":
            yield from pyarrow.parquet.read_table(path).to_pylist()
            return
        with fsspec.open(str(path), "rt", compression="infer", encoding="utf-8", newline="") as file:
            if kind == "csv":
                yield from csv.DictReader(file)
            elif kind == "json":
                rows = json.load(file)
                yield from rows if isinstance(rows, list) else [rows]
            else:
                yield from (json.loads(line) for line in file if line.strip())
    except (OSError, EOFError, ValueError, csv.Error, zlib.error) as error:  # damaged gzip, JSON, UTF-8, parquet
        raise ValueError(f"{path} cannot be read: {error}") from error

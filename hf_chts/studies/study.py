"""A study's YAML file, and the runs that it asks for."""

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_chts.config_checks import unknown
from hf_chts.config_file import read
from hf_chts.files.atomic import finite_or_null

_FIELDS = ("title", "task", "seeds", "settings", "rows", "reference", "quick")
_OF_ROW = ("label", "paper", "seeds", "settings", "group")
_OF_QUICK = ("title", "seeds", "settings", "rows")
_NAME = re.compile(r"\w[\w.+-]*")  # of a row: part of the names of files
_LONGEST_NAME = 100  # bytes; many file systems have names of up to 255


@dataclass(frozen=True)
class Row:
    """One row of a study's tables: settings of its own, run with every seed.

    Attributes:
        name: as in the YAML; part of file names.
        label: as tables show it.
        group: rows of one group are compared with each other; "" if the study has no groups.
        paper: the paper's figure and its error, if it has them.
        seeds: one run each.
        settings: those of the study with the row's own merged into them.
    """

    name: str
    label: str
    group: str
    paper: tuple[float, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        study: the name of the study.
        row, seed: which run of it.
        settings: what the task is to do.
        folder: where it may keep checkpoints while it is unfinished.
    """

    study: str
    row: str
    seed: int
    settings: Mapping[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.row}-{self.seed}"


@dataclass
class Outcome:
    """What a task gives back.

    Attributes:
        figures: numbers by name, such as {"accuracy_last": 90.6}.
        curves: lists of one length by name; the first is what they run over, such as "epoch".
        seconds: of training alone, wall clock, over all attempts of a run that was cut off.
        processor_seconds: the same, of all threads of the process.
        sparsity: the SparsityConfig that the run had, with all its defaults and what the task has set.
    """

    figures: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    processor_seconds: float = 0.0
    sparsity: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A study: its rows, and how they are run.

    Attributes:
        name: the file's name without its suffix.
        title: in words.
        task: a name of `tasks.TASKS`.
        rows: in the order of the file.
        quick: whether this is the short form.
        references: rows that the others are compared with, seed by seed; `reference` in the YAML, a row or a list. A
            short form has those of them that are among its rows.
    """

    name: str
    title: str
    task: str
    rows: tuple[Row, ...]
    quick: bool = False
    references: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: str | Path, *, quick: bool = False) -> "Study":
        """Read a YAML file.

        Args:
            quick: take the short form, the part `quick` of the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a study, or has no short form; the message names what is wrong.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no study at {path}: give a YAML file such as studies/classification.yaml"
            )
        values = read(path)
        try:
            return cls._of(path.stem, values, quick)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _of(cls, name: str, values: Any, quick: bool) -> "Study":
        _check_fields("a study", values, _FIELDS, needed=("task", "seeds", "rows"))
        rows, settings = values["rows"], _mapping("settings", values.get("settings"))
        seeds = _seeds(values["seeds"])
        if not isinstance(rows, dict) or not rows:
            raise ValueError(f"rows is {rows!r}; it must map names of rows to their settings")
        for row in rows:
            if not isinstance(row, str) or not _NAME.fullmatch(row) or len(row.encode()) > _LONGEST_NAME:
                raise ValueError(
                    f"the row {row!r} has a name that files cannot have: take letters, digits, _, -, + and dots, "
                    f"{_LONGEST_NAME} of them at most, in quotes where it looks like a number"
                )
        references = values.get("reference", [])
        references = references if isinstance(references, list) else [references]
        _check_rows("row as reference", references, rows)
        if quick:
            if "quick" not in values:
                raise ValueError(
                    "it has no short form: add a part `quick` with settings, seeds and rows, or leave out --quick"
                )
            short = values["quick"]
            _check_fields("quick", short, _OF_QUICK)
            chosen = short.get("rows", list(rows))
            if not isinstance(chosen, list) or not chosen:
                raise ValueError(f"rows of quick is {chosen!r}; it must be a list of names of rows")
            _check_rows("row in quick", chosen, rows)
            rows = {row: rows[row] for row in chosen}
        made = []
        for row, own in rows.items():
            own = {} if own is None else own
            _check_fields(f"row {row!r}", own, _OF_ROW)
            merged = merge(settings, _mapping(f"settings of row {row!r}", own.get("settings")))
            of_row = _seeds(own.get("seeds", seeds))
            if quick:
                merged = merge(merged, _mapping("settings of quick", short.get("settings")))
                of_row = _seeds(short.get("seeds", of_row))
            paper = () if quick else own.get("paper", ())  # a short form is compared with nobody
            paper = tuple(paper) if isinstance(paper, (list, tuple)) else (paper,)
            numbers = all(type(n) in (int, float) and math.isfinite(n) for n in paper)
            if not numbers or len(paper) > 2 or min(paper[1:], default=0) < 0:
                raise ValueError(f"paper of row {row!r} is {own['paper']!r}; it must be a number, or it and its error")
            label, group = (_text(f"{what} of row {row!r}", own, what, "") for what in ("label", "group"))
            made.append(Row(row, label or row, group, paper, of_row, merged))
        compared = tuple(row for row in dict.fromkeys(references) if row in rows)
        title, task = (_text(what, values, what, name) for what in ("title", "task"))
        if quick:
            title = _text("title of quick", short, "title", title)
        return cls(name, title, task, tuple(made), quick, compared)

    def runs(self, scratch: Path) -> list[Run]:
        """All runs, those of the first seed first. Each keeps its checkpoints in a folder of its own in `scratch`."""
        seeds = sorted({seed for row in self.rows for seed in row.seeds})
        return [
            Run(self.name, row.name, seed, row.settings, scratch / f"{row.name}-{seed}")
            for seed in seeds
            for row in self.rows
            if seed in row.seeds
        ]


def as_saved(settings: Mapping[str, Any]) -> Any:
    """Settings as they are read back from a result file, which has names as text, and null for infinity."""
    return json.loads(json.dumps(finite_or_null(settings)))


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, mappings within them merged likewise; neither is changed.

    Raises:
        ValueError: one has a mapping where the other has a single value, of which one would be lost.
    """
    merged = copy.deepcopy(dict(base))
    for name, value in over.items():
        there = merged.get(name)
        if name in merged and isinstance(there, Mapping) != isinstance(value, Mapping):
            raise ValueError(f"{name} is {there!r} in one place and {value!r} in another: make both a mapping")
        merged[name] = merge(there, value) if isinstance(there, Mapping) else copy.deepcopy(value)
    return merged


def _seeds(values: Any) -> tuple[int, ...]:
    if (
        not isinstance(values, Sequence)
        or isinstance(values, str)
        or not values
        or any(type(v) is not int or not 0 <= v < 1 << 32 for v in values)
    ):
        raise ValueError(f"seeds is {values!r}; it must be a list of whole numbers from 0 to 2^32 − 1")
    if len(set(values)) < len(values):
        raise ValueError(f"seeds is {values!r}; each may be there once")
    return tuple(values)


def _mapping(what: str, values: Any) -> Mapping[str, Any]:
    if values is not None and not isinstance(values, Mapping):
        raise ValueError(f"{what} is {values!r}; it must map names of settings to values")
    return values or {}


def _text(what: str, values: Mapping[str, Any], name: str, default: str) -> str:
    value = values.get(name, default)
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r}; it must be text: put it in quotes")
    return value


def _check_rows(what: str, names: Sequence[Any], rows: Mapping[str, Any]) -> None:
    for row in names:
        if not isinstance(row, str):
            raise ValueError(f"the {what} is {row!r}; it must be the name of a row")
        if row not in rows:
            raise ValueError(unknown(what, row, rows))


def _check_fields(what: str, values: Any, known: Sequence[str], needed: Sequence[str] = ()) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} is a mapping of fields, got a {type(values).__name__}")
    for name in values:
        if name not in known:
            raise ValueError(unknown(f"field of {what}", name, known))
    for name in needed:
        if name not in values:
            raise ValueError(f"{what} needs {name!r}")

"""The result files of a study, by row and seed, and which of them are missing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_chts.files.atomic import finite_or_null
from hf_chts.studies.study import Row, Run, Study, as_saved

Result = Mapping[str, Any]
# what a page needs of a result, and of the mappings in it
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "settings": (),
    "row": (),
    "seed": (),
    "figures": (),
    "seconds": (),
    "processor_seconds": (),
    "memory_mib": ("peak", "before_training"),
    "machine": ("device", "threads", "capability", "versions"),
    "command": (),
    "curves": (),
}


@dataclass(frozen=True)
class StudyResults:
    """What is there of a study.

    Attributes:
        study: whose results they are.
        by_row: the results of each row of the study, by seed; a row without results has an empty mapping.
        missing: the runs that have no result.
        changed: the runs whose result is of other settings than the study now has; it is not in `by_row`.
        others: names of further results in the folder, of no run of the study.
    """

    study: Study
    by_row: Mapping[str, Mapping[int, Result]]
    missing: tuple[Run, ...]
    changed: tuple[Run, ...]
    others: tuple[str, ...]

    @classmethod
    def read(cls, study: Study, folder: Path) -> "StudyResults":
        """Read a folder of result files, which need not exist yet.

        Raises:
            ValueError: a file is not a result; the message names it.
        """
        by_row: dict[str, dict[int, Result]] = {row.name: {} for row in study.rows}
        missing, changed = [], []
        # no run is started here: where it would keep its checkpoints does not matter
        runs = study.runs(Path())
        for run in runs:
            path = folder / f"{run.name}.json"
            if not path.is_file():
                missing.append(run)
                continue
            result = read_result(path, run)
            if result["settings"] != as_saved(run.settings):
                changed.append(run)
                continue
            by_row[run.row][run.seed] = result
        known = {run.name for run in runs}
        others = sorted(path.stem for path in folder.glob("*.json") if path.stem not in known)
        return cls(study, by_row, tuple(missing), tuple(changed), tuple(others))

    @property
    def results(self) -> list[Result]:
        """All results, row by row."""
        return [result for row in self.by_row.values() for result in row.values()]

    def values(self, row: str, figure: str) -> dict[int, float]:
        """A figure of a row by seed, of the runs that have it and where it is finite."""
        found = {seed: result["figures"].get(figure) for seed, result in self.by_row[row].items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def not_finite(self, row: str, figure: str) -> int:
        """How many runs of a row have this figure but no finite number in it, which a result file holds as null."""
        figures = [result["figures"] for result in self.by_row[row].values()]
        return sum(figure in of and of[figure] is None for of in figures)

    def groups(self) -> dict[str, list[Row]]:
        """The rows of each group, in the order of the file."""
        groups: dict[str, list[Row]] = {}
        for row in self.study.rows:
            groups.setdefault(row.group, []).append(row)
        return groups


def gpu_of(result: Result) -> str:
    """The name of the GPU that a run had; "" for a CPU."""
    return str(result["machine"]["device"]) if "of_device" in result["memory_mib"] else ""


def read_result(path: Path, run: Run | None = None) -> Result:
    """What a result file holds, with None for numbers that are not finite.

    Args:
        run: whose result it is to be.

    Raises:
        ValueError: it is not the result of a run, or of another; the message names it.
    """
    remedy = "remove it to run it again"
    try:
        result = finite_or_null(json.loads(path.read_text(encoding="utf-8")))
        for name, inside in _NEEDED.items():
            for one in inside:
                result[name][one]
            result[name]
        _check_values(result)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not the result of a run ({error}): {remedy}") from error
    except KeyError as error:
        raise ValueError(f"{path} is not the result of a run, it has no {error}: {remedy}") from error
    if run is not None and (result["row"], result["seed"]) != (run.row, run.seed):
        raise ValueError(f"{path} is the result of {result['row']}-{result['seed']}, and not of {run.name}: {remedy}")
    return result


def _check_values(result: Result) -> None:
    for name in ("settings", "figures", "curves"):
        if not isinstance(result[name], Mapping):
            raise ValueError(f"its {name} are {result[name]!r}")
    figures, seconds = result["figures"].items(), ((name, result[name]) for name in ("seconds", "processor_seconds"))
    memory = result["memory_mib"].items()
    for name, value in (*figures, *seconds, *memory):
        if type(value) not in (int, float) and not (value is None and name in result["figures"]):
            raise ValueError(f"its {name} is {value!r}")
    if not all(isinstance(curve, list) for curve in result["curves"].values()):
        raise ValueError("its curves are not lists of numbers")
    if len({len(curve) for curve in result["curves"].values()}) > 1:
        raise ValueError("its curves have different numbers of points")
    if not all(isinstance(text, str) for text in (result["command"], *result["machine"]["versions"].values())):
        raise ValueError("its command or versions are not text")

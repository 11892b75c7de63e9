"""What a run of a study can train. A task is a function of a run and of a place to say how far it is."""

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, get_origin, get_type_hints

from hf_chts.config import SparsityConfig
from hf_chts.config_checks import unknown
from hf_chts.studies.study import Outcome, Run

Say = Callable[[str], None]
Task = Callable[[Run, Say], Outcome]
_Settings = TypeVar("_Settings")

TOO_MANY_THREADS = 1025  # torch ends the process where it cannot start them

# where they are: each imports much that the others do not need
TASKS: Mapping[str, str] = {
    "classification": "hf_chts.studies.classification",
    "translation": "hf_chts.studies.translation",
    "language": "hf_chts.studies.language",
}


def task_settings(task: str) -> type:
    """The dataclass of a task's settings.

    Raises:
        ValueError: there is no such task.
    """
    return _module(task).Settings


def train(task: str, run: Run, say: Say) -> Outcome:
    """Train one run, or go on with it where its folder has a checkpoint."""
    return _module(task).train(run, say)


def last_checkpoint(run: Run, output_dir: str) -> str | None:
    """The last complete checkpoint of a run's Trainer, each file compared with its seal; None if there is none.

    Raises:
        FileNotFoundError, ValueError: a file of it is missing or damaged; the message names it and the remedy.
    """
    from hf_chts.checkpoint.run_folder import last_sealed
    from hf_chts.checkpoint.seal import verify_seal

    found = last_sealed(output_dir)
    if found is not None:
        verify_seal(found, remedy=f"Remove {run.folder} to begin the run anew")
    return found


def parsed(kind: type[_Settings], values: Mapping[str, Any]) -> _Settings:
    """Settings of a run as their dataclass.

    Raises:
        ValueError: one is unknown, missing or of another type; the message names it.
    """
    fields = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in fields:
            raise ValueError(unknown("setting", name, fields))
        if hints[name] is float and type(value) is int:
            values = {**values, name: float(value)}
        elif hints[name] in (int, float, str, bool) and type(value) is not hints[name]:
            raise ValueError(f"setting {name} is {value!r}; it must be of type {hints[name].__name__}")
        elif get_origin(hints[name]) is dict and not isinstance(value, Mapping):
            raise ValueError(f"setting {name} is {value!r}; it must be a mapping")
    for name, item in fields.items():
        no_default = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if item.init and no_default and name not in values:
            raise ValueError(f"setting {name} is missing")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"settings: {error}") from error


def check_range(settings: Any, names: Iterable[str], low: float, high: float = math.inf) -> None:
    """Raises ValueError, naming the setting, if one of these is not in [low, high), or no number."""
    for name in names:
        if not low <= getattr(settings, name) < high:
            limit = f"at least {low:g}" + (f" and less than {high:g}" if high < math.inf else ", and finite")
            raise ValueError(f"setting {name} is {getattr(settings, name)}; it must be {limit}")


def check_positive(settings: Any, names: Iterable[str]) -> None:
    """Raises ValueError, naming the setting, if one of these is not more than 0, or is infinite."""
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"setting {name} is {getattr(settings, name)}; it must be more than 0, and finite")


def sparsity_config(fields: Mapping[str, Any], **own: Any) -> SparsityConfig:
    """The sparsity of a run.

    Args:
        fields: of SparsityConfig, as the study has them.
        own: those that the task sets, such as topology_seed, which is the run's seed.

    Raises:
        ValueError: a field is unknown or bad, or is the task's to set.
    """
    for name in own:
        if name in fields:
            raise ValueError(f"sparsity has {name}, which follows from the run's other settings: leave it out")
    return parsed(SparsityConfig, {**fields, **own})


def _module(task: str) -> Any:
    if task not in TASKS:
        raise ValueError(unknown("task", task, TASKS))
    return importlib.import_module(TASKS[task])

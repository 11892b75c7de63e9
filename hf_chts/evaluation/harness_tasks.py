"""The harness's tasks: where they are found, and loaded from, and why not. Imported late, as it imports the harness."""

import logging
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import lm_eval.tasks
import numpy as np
import torch
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from hf_chts.evaluation.answer_overlap import squad_metrics_importable
from hf_chts.evaluation.embedded_suite import EMBEDDED_TASKS
from hf_chts.evaluation.task_data import expected_file, task_folder, write_local_task

logger = logging.getLogger(__name__)

# simple_evaluate's own; it is not used itself, because it also runs git, describes the machine and asks the Hub
_SEED = 1234

# Where the harness keeps the tasks of our suites: to index all of its 15,000 files takes ten seconds
_SUITE_FOLDERS = (
    "arc",
    "glue",
    "hellaswag",
    "lambada",
    "openbookqa",
    "piqa",
    "super_glue",
    "wikitext",
    "winogrande",
)


@dataclass
class LoadedTasks:
    """What is to be run.

    Attributes:
        units: {name of a task or a group: what `evaluate` takes}.
        skipped: {task: why it could not be loaded}.
        local: {task: the folder that its data is from}, with data files of one's own.
    """

    units: dict[str, TaskDict] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    local: dict[str, str] = field(default_factory=dict)


def task_manager(tasks: list[str], embedded_directory: Path) -> TaskManager:
    """An index of tasks that has all of `tasks`; if one of them is unknown, of all that there are."""
    harness = Path(lm_eval.tasks.__file__).parent
    folders = [harness / folder for folder in _SUITE_FOLDERS if (harness / folder).is_dir()]
    manager = TaskManager(include_path=[*folders, embedded_directory], include_defaults=False)
    if set(tasks) <= manager.task_index.keys():
        return manager
    everything = _all_harness_tasks()
    everything.task_index.update(manager.task_index)  # overrides an earlier call's, whose embedded folder is gone
    return everything


@lru_cache(maxsize=1)
def _all_harness_tasks() -> TaskManager:
    return TaskManager()


def load_tasks(
    manager: TaskManager,
    names: list[str],
    num_fewshot: int | None = None,
    *,
    limit: int | None = None,
    task_data: Path | None = None,
    written: Path | None = None,
) -> LoadedTasks:
    """The tasks and groups called `names`; a tag stands for its tasks.

    A task is left out if its data is neither cached nor to be had, or cannot be read.

    Args:
        num_fewshot: replaces each task's own number of examples, but never a 0 that its file sets on purpose, as in
            the harness's own `simple_evaluate`.
        limit: documents per task, so many of which are looked at where they are the user's.
        task_data: a directory with data files of tasks (task_data.py); tasks that it has no folder for, and groups,
            are loaded as always.
        written: where to keep what was read from there.
    """
    loaded = LoadedTasks()
    with ExitStack() as offline:
        for name in members(manager, names):
            entry = manager.task_index[name]
            config: dict[str, Any] = entry.cfg or {}
            folder = task_folder(task_data, name, config) if task_data and entry.kind.name == "TASK" else None
            seeded()
            try:
                uncounted = _uncounted() if folder or name in EMBEDDED_TASKS else nullcontext()
                with uncounted, squad_metrics_importable():
                    if folder and written and entry.yaml_path:
                        definition = write_local_task(
                            name, Path(entry.yaml_path), config, folder, written, num_fewshot=num_fewshot
                        )
                        unit = manager.load([str(definition)])
                        check_documents(unit["tasks"][name], limit)
                        loaded.local[name] = str(folder)
                    else:
                        unit = manager.load([name])
            except Exception as error:
                logger.debug("Task %s could not be loaded", name, exc_info=True)
                loaded.skipped[name] = _reason(error, name, config, folder)
                if isinstance(error, ConnectionError) and not folder:
                    offline.enter_context(_offline())
                continue
            _set_examples(unit, num_fewshot)
            loaded.units[name] = unit
    return loaded


def _set_examples(unit: TaskDict, num_fewshot: int | None) -> None:
    for task in unit["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=_SEED)


@contextmanager
def _offline() -> Iterator[None]:
    """Once the Hub was out of reach: without this, each further task tries it again for half a minute."""
    places = [(huggingface_hub.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def members(manager: TaskManager, names: list[str]) -> list[str]:
    """`names` with the tasks of each tag in its place, each once."""
    entries = [(name, manager.task_index[name]) for name in names]
    return list(
        dict.fromkeys(
            task for name, entry in entries for task in (sorted(entry.tags) if entry.kind.name == "TAG" else [name])
        )
    )


def check_documents(task: Task, limit: int | None = None) -> None:
    """Make the prompt of every document that will be asked, so that a bad one is found before hours of others.

    Raises:
        ValueError: with the number of the document, from 1.
    """
    for number, doc in enumerate(task.eval_docs, start=1):
        if limit is not None and number > limit:
            return
        try:
            task.doc_to_text(doc)
            target = task.doc_to_target(doc)
            choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else None
        except Exception as error:  # of templates, and of the task's own functions
            raise ValueError(f"no prompt can be made of document {number}: {type(error).__name__}: {error}") from error
        if choices is None or task.multiple_input or task.config.process_results is not None:
            continue
        for answer in target if isinstance(target, list) else [target]:
            if not (0 <= answer < len(choices) if isinstance(answer, int) else answer in choices):
                raise ValueError(f"the answer of document {number}, {answer!r}, is none of its choices {choices}")


def _reason(error: Exception, name: str, config: dict[str, Any], folder: Path | None) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    if folder:
        return f"its data in {folder} cannot be used: {said}"
    if not config.get("dataset_path") or name in EMBEDDED_TASKS:
        return f"it could not be loaded: {said}"
    # of a data set of which only another configuration is cached, datasets says it with a ValueError
    lacking = isinstance(error, OSError) or "cache" in said
    dataset = " ".join(str(config[key]) for key in ("dataset_path", "dataset_name") if config.get(key))
    help_ = f"Run it once with a network, or pass --task_data DIR with DIR/{expected_file(name, config)}"
    why = "is not cached and could not be downloaded" if lacking else "could not be loaded"
    return f"its data, {dataset}, {why}. {help_} ({said})"


def seeded() -> None:
    """Seed the global generators, before each task: its result depends on no other task's."""
    random.seed(_SEED)
    np.random.seed(_SEED)  # noqa: NPY002, the harness uses this one
    torch.manual_seed(_SEED)


@contextmanager
def _uncounted() -> Iterator[None]:
    """Without this, datasets tells a server about every local file that it loads, for its download counts."""
    counted = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counted


def chance_accuracies(tasks: dict[str, Task], documents: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Accuracy of guessing in each multiple-choice task that was run, from the choices of the questions asked.

    Args:
        documents: {task: its samples, as the harness records them}.
    """
    chance = {}
    for name, task in tasks.items():
        # mutual information doubles the requests of a question
        if task.OUTPUT_TYPE == "multiple_choice" and "acc_mutual_info" not in task.aggregation():
            choices = Counter(len(sample["arguments"]) for sample in documents[name])
            chance[name] = sum(count / number for number, count in choices.items()) / choices.total()
    return chance

"""Finding and loading the harness's tasks. Imported late, as it imports the harness."""

import importlib.util
import logging
import random
import re
import string
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import huggingface_hub.constants
import lm_eval.tasks
import numpy as np
import torch
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from hf_chts.evaluation.embedded_suite import EMBEDDED_TASKS
from hf_chts.evaluation.harness import temporarily
from hf_chts.evaluation.task_data import expected_file, task_folder, write_local_task

logger = logging.getLogger(__name__)

# the seed of `lm_eval.simple_evaluate`, which we avoid because it runs git, describes the machine and asks the Hub
_SEED = 1234

# the harness's folders with the tasks of our suites; indexing all of its 15,000 files takes ten seconds
_SUITE_FOLDERS = ["arc", "glue", "hellaswag", "lambada", "openbookqa", "piqa", "super_glue", "wikitext", "winogrande"]


@dataclass
class LoadedTasks:
    """The tasks to run.

    Attributes:
        units: {name of a task or a group: what `lm_eval.evaluate` takes}.
        skipped: {task: why it could not be loaded}.
        local: {task: the folder of its data}, for tasks on local data files.
    """

    units: dict[str, TaskDict] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    local: dict[str, str] = field(default_factory=dict)


def task_manager(tasks: list[str], embedded_directory: Path) -> TaskManager:
    """An index of the suites' tasks; if one of `tasks` is not among them, of all tasks of the harness."""
    harness = Path(lm_eval.tasks.__file__).parent
    folders = [harness / folder for folder in _SUITE_FOLDERS if (harness / folder).is_dir()]
    manager = TaskManager(include_path=[*folders, embedded_directory], include_defaults=False)
    if set(tasks) <= manager.task_index.keys():
        return manager
    everything = _all_harness_tasks()
    everything.task_index.update(manager.task_index)  # replaces the embedded tasks of an earlier call
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
    """Load the tasks and groups called `names`; a tag stands for its tasks.

    A task is skipped if its data cannot be downloaded and is not cached, or cannot be read.

    Args:
        num_fewshot: replaces each task's own number of examples, except a 0 that its file sets, as in the harness.
        limit: how many documents of a task with local data are checked.
        task_data: a directory with local data of tasks (see task_data.py). Groups, and tasks without a folder there,
            are loaded as always.
        written: a directory for the tasks' definitions and checked data.
    """
    loaded = LoadedTasks()
    with ExitStack() as offline:
        for name in members(manager, names):
            entry = manager.task_index[name]
            config: dict[str, Any] = entry.cfg or {}
            folder = task_folder(task_data, name, config) if task_data and entry.kind.name == "TASK" else None
            seeded()
            try:
                # else `datasets` reports every local file that it loads to a server, to count downloads
                local = folder is not None or name in EMBEDDED_TASKS
                counts = (datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
                with temporarily(*counts) if local else nullcontext(), _squad_metrics():
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
                    # each further task would try to reach the Hub for half a minute
                    for module in (huggingface_hub.constants, datasets.config):
                        offline.enter_context(temporarily(module, "HF_HUB_OFFLINE", True))
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


def members(manager: TaskManager, names: list[str]) -> list[str]:
    """`names` with each tag replaced by its tasks; each name once."""
    found: dict[str, None] = {}
    for name in names:
        entry = manager.task_index[name]
        found |= dict.fromkeys(sorted(entry.tags) if entry.kind.name == "TAG" else [name])
    return list(found)


def check_documents(task: Task, limit: int | None = None) -> None:
    """Make the prompts of the first `limit` documents, so that a bad document is found before hours of evaluation.

    Raises:
        ValueError: a document is bad; with its number, from 1.
    """
    for number, doc in enumerate(islice(task.eval_docs, limit), start=1):
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
                raise ValueError(f"the answer of document {number}, {answer!r}, is not one of its choices {choices}")


def _reason(error: Exception, name: str, config: dict[str, Any], folder: Path | None) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    if folder:
        return f"its data in {folder} cannot be used: {said}"
    if not config.get("dataset_path") or name in EMBEDDED_TASKS:
        return f"it could not be loaded: {said}"
    # `datasets` raises ValueError if only another configuration of the data set is cached
    lacking = isinstance(error, OSError) or "cache" in said
    dataset = " ".join(str(config[key]) for key in ("dataset_path", "dataset_name") if config.get(key))
    help_ = f"Run it once with a network, or pass --task_data DIR with DIR/{expected_file(name, config)}"
    why = "is not cached and could not be downloaded" if lacking else "could not be loaded"
    return f"its data, {dataset}, {why}. {help_} ({said})"


def seeded() -> None:
    """Seed the global generators before each task, so that its result does not depend on the tasks before it."""
    random.seed(_SEED)
    np.random.seed(_SEED)  # noqa: NPY002, the harness uses this one
    torch.manual_seed(_SEED)


@contextmanager
def _squad_metrics() -> Iterator[None]:
    """Within the context `transformers.data.metrics.squad_metrics` can be imported.

    The harness's ReCoRD (SuperGLUE) needs it, and transformers 5 no longer has it.
    """
    place = "transformers.data.metrics"
    if importlib.util.find_spec(place) is not None:
        yield
        return
    package, module = ModuleType(place), ModuleType(f"{place}.squad_metrics")
    vars(module).update(compute_exact=compute_exact, compute_f1=compute_f1)
    vars(package).update(squad_metrics=module, __path__=[])
    added = {package.__name__: package, module.__name__: module}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


def _words(answer: str) -> list[str]:
    """The words of an answer without case, punctuation and articles, as in SQuAD."""
    kept = "".join(character for character in answer.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def compute_exact(gold: str, answer: str) -> int:
    """1 if both answers have the same words, else 0."""
    return int(_words(gold) == _words(answer))


def compute_f1(gold: str, answer: str) -> float:
    """Harmonic mean of the shares of each answer's words that are in the other; if one is empty, whether both are."""
    expected, given = _words(gold), _words(answer)
    if not expected or not given:
        return float(expected == given)
    return 2 * (Counter(expected) & Counter(given)).total() / (len(expected) + len(given))

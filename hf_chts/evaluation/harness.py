"""What we change about the lm-eval harness. Imported late: the harness takes seconds to import."""

import logging
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import datasets
import lm_eval.tasks
import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from hf_chts.evaluation.embedded_suite import EMBEDDED_TASKS

__all__ = [
    "HarnessLog",
    "ProgressHFLM",
    "chance_accuracies",
    "evaluate",
    "load_tasks",
    "task_manager",
    "undisturbed",
]

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


class ProgressHFLM(HFLM):
    """HFLM with its progress bars on or off; on, it still leaves out the one that it shows for every single batch."""

    def __init__(self, *, progress: bool, **settings: Any) -> None:
        self.progress = progress
        super().__init__(**settings)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self.progress)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not self.progress)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # only loglikelihood_rolling sets override_bs: one call, and one bar, per batch
        quiet = disable_tqdm or override_bs is not None
        return super()._loglikelihood_tokens(requests, disable_tqdm=quiet, override_bs=override_bs)


class HarnessLog(logging.Filter):
    """Within the context: drops what the harness says about choices we made, counts the requests that it truncates."""

    # Each says only that a default applies, or that we did on purpose what we did on purpose:
    EXPECTED = (
        "`pretrained` model kwarg is not of type `str`",  # a live model is one of our two cases
        "Passed an already-initialized model through `pretrained`",
        "is defined, but aggregation is not. using default",  # the harness's own task files
        "is defined, but higher_is_better is not. using default",
    )
    LOGGERS = ("lm_eval.models.huggingface", "lm_eval.api.task")

    def __init__(self) -> None:
        super().__init__()
        self.truncated = 0

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "exceeds model's maximum length" in message:
            self.truncated += 1  # one warning per request would be thousands of lines; the caller gives one
            return False
        return not any(text in message for text in self.EXPECTED)

    def __enter__(self) -> "HarnessLog":
        for name in self.LOGGERS:
            logging.getLogger(name).addFilter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self.LOGGERS:
            logging.getLogger(name).removeFilter(self)


@contextmanager
def undisturbed(model: torch.nn.Module | None, *, progress: bool) -> Iterator[None]:
    """Seed the global generators within the context, and afterwards put them and `model`'s mode back.

    Some tasks of the harness draw from the global generators, and it calls `model.eval()`; a training run that is
    evaluated on its way must go on as if it had not been.
    """
    modes = {module: module.training for module in model.modules()} if model is not None else {}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002, the harness uses this one
    bars_were_on = not datasets.are_progress_bars_disabled()
    if not progress:
        datasets.disable_progress_bars()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            random.seed(_SEED)
            np.random.seed(_SEED)  # noqa: NPY002
            torch.manual_seed(_SEED)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        if bars_were_on:
            datasets.enable_progress_bars()
        for module, training in modes.items():
            module.training = training


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
    manager: TaskManager, names: list[str], num_fewshot: int | None = None
) -> tuple[TaskDict, dict[str, str]]:
    """The tasks and groups called `names` (a tag stands for its tasks), and why those left out could not be loaded.

    A task is left out if its data is neither cached nor to be had. `num_fewshot` replaces each task's own number of
    examples, but never a 0 that its file sets on purpose, as in the harness's own `simple_evaluate`.
    """
    loaded = TaskDict(tasks={}, groups={}, group_map={})
    skipped: dict[str, str] = {}
    for name in names:
        entry = manager.task_index[name]
        for member in sorted(entry.tags) if entry.kind.name == "TAG" else [name]:
            try:
                with _uncounted() if member in EMBEDDED_TASKS else nullcontext():
                    found = manager.load([member])
            except OSError as error:  # datasets' and the Hub's errors of connection, and missing files
                skipped[member] = f"its data is not cached and could not be loaded: {error}"
                continue
            for part in ("tasks", "groups", "group_map"):
                loaded[part].update(found.get(part, {}))
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None or (num_fewshot is not None and task.get_config("num_fewshot") != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=_SEED)
    return loaded, skipped


@contextmanager
def _uncounted() -> Iterator[None]:
    """Without this, datasets tells a server about every local JSON file that it loads, for its download counts."""
    counted = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counted


def chance_accuracies(tasks: dict[str, Task]) -> dict[str, float]:
    """Accuracy of guessing in each multiple-choice task that was run, from the choices of the questions asked."""
    chance = {}
    for name, task in tasks.items():
        # mutual information doubles the requests of a question
        if task.OUTPUT_TYPE == "multiple_choice" and "acc_mutual_info" not in task.aggregation():
            choices = Counter(instance.doc_id for instance in task.instances)
            chance[name] = sum(1 / count for count in choices.values()) / len(choices)
    return chance

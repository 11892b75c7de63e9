"""What we change about a run of the lm-eval harness. Imported late: the harness takes seconds to import."""

import contextlib
import functools
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain, zip_longest
from types import TracebackType
from typing import Any

import datasets
import lm_eval.api.task
import numpy as np
import torch
from accelerate import PartialState
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM

__all__ = ["HarnessLog", "RankedHFLM", "evaluate", "restored"]

_ABSENT = object()


class RankedHFLM(HFLM):
    """HFLM that knows its rank wherever it was launched, and whose results do not depend on the number of ranks.

    HFLM shares documents out only where a machine has two GPUs or more, and by the rank within the machine: with a GPU
    per machine, or on CPUs, each rank does all the work, and with GPUs on two machines half of the documents are left
    out.

    Args:
        progress: show progress bars; even then not the one that it has for every single batch.
    """

    def __init__(self, *, progress: bool, **settings: Any) -> None:
        self.progress = progress
        if isinstance(settings["pretrained"], str):
            _join_ranks_on_cpu(settings["device"])
        super().__init__(**settings)
        if hasattr(self, "accelerator"):
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes

    def _create_model(self, *arguments: Any, **settings: Any) -> None:
        with warnings.catch_warnings():
            # HFLM hands transformers the quantization_config of the model's own config once more
            warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
            super()._create_model(*arguments, **settings)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """What all ranks have, on rank `dst`, with lists in the order of the documents.

        The harness puts the ranks' lists one after the other. Documents went round the ranks, and sums of floating
        point numbers depend on their order.
        """
        gathered = super().gather_object(obj, dst)
        return gathered if gathered is None or len(gathered) == 1 else [_in_turns(gathered)]

    def total(self, count: int) -> int:
        """The sum of `count` over all ranks."""
        return int(self.all_gather(torch.tensor([count], device=self.device)).sum())

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        # The harness repeats a rank's last request until all ranks have the same number, for models that are split
        # over ranks; this one is not, and to ask once is enough.
        once = len(requests)
        while once > 1 and requests[once - 1] is requests[once - 2]:
            once -= 1
        answers = super().loglikelihood(requests[:once], disable_tqdm=disable_tqdm or not self.progress)
        return [*answers, *answers[-1:] * (len(requests) - once)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not self.progress)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # only loglikelihood_rolling sets override_bs: one call, and one bar, per batch
        quiet = disable_tqdm or override_bs is not None
        return super()._loglikelihood_tokens(requests, disable_tqdm=quiet, override_bs=override_bs)


def _join_ranks_on_cpu(device: str) -> None:
    """Make ranks that were launched on CPUs know of each other; HFLM's own Accelerator does so only with GPUs."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and torch.device(device).type == "cpu" and not PartialState._shared_state:
        PartialState(cpu=True, timeout=timedelta(weeks=52))  # as HFLM's: ranks wait for the slowest


def _in_turns(parts: list[Any]) -> Any:
    """Dicts of lists, of any depth, as one: the first item of each part's list, then the second of each, and so on."""
    if isinstance(parts[0], dict):
        return {key: _in_turns([part[key] for part in parts]) for key in parts[0]}
    return [item for item in chain.from_iterable(zip_longest(*parts, fillvalue=_ABSENT)) if item is not _ABSENT]


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
def restored(model: torch.nn.Module | None, *, progress: bool) -> Iterator[None]:
    """Afterwards put the global random generators and `model`'s mode back; within, keep the harness quiet.

    Some tasks of the harness draw from the global generators, and it calls `model.eval()`; a training run that is
    evaluated on its way must go on as if it had not been. What the harness prints goes to stderr.
    """
    modes = {module: module.training for module in model.modules()} if model is not None else {}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002, the harness uses this one
    bars_were_on, prompt_bar = not datasets.are_progress_bars_disabled(), lm_eval.api.task.tqdm
    if not progress:
        datasets.disable_progress_bars()
        lm_eval.api.task.tqdm = functools.partial(prompt_bar, disable=True)
    # its bootstrap forks a pool of processes, for a single chunk of work
    parallel = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        lm_eval.api.task.tqdm = prompt_bar
        if bars_were_on:
            datasets.enable_progress_bars()
        if parallel is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = parallel
        for module, training in modes.items():
            module.training = training

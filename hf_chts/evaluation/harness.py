"""What we change in a run of the lm-eval harness. Imported late, because the harness takes seconds to import."""

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
from typing import Any

import datasets
import lm_eval.api.task
import numpy as np
import torch
from accelerate import PartialState
from lm_eval.models.huggingface import HFLM

from hf_chts.evaluation.embedded_suite import in_turns


class RankedHFLM(HFLM):
    """HFLM that knows its rank however it was launched, and whose results do not depend on the number of ranks.

    HFLM shares documents only on a machine with two GPUs or more, and by the rank within the machine: on CPUs or with
    one GPU per machine, each rank does all the work, and on two machines with several GPUs half of the documents are
    left out.

    Args:
        progress: show progress bars, except those that HFLM has for every single batch.
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
            # HFLM passes the quantization_config that the model's config already has
            warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
            super()._create_model(*arguments, **settings)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all ranks, on rank `dst`, with lists in the order of the documents.

        The harness joins the lists rank by rank, but documents are dealt out in turns, and floating point sums depend
        on their order.
        """
        gathered = super().gather_object(obj, dst)
        return gathered if gathered is None or len(gathered) == 1 else [_merge(gathered)]

    def total(self, count: int) -> int:
        """The sum of `count` over all ranks."""
        return int(self.all_gather(torch.tensor([count], device=self.device)).sum())

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        # The harness repeats a rank's last request until all ranks have equally many, for models that are split over
        # ranks. This one is not split: ask once.
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
        # loglikelihood_rolling, the only caller that sets override_bs, would show a bar for every batch
        quiet = disable_tqdm or override_bs is not None
        return super()._loglikelihood_tokens(requests, disable_tqdm=quiet, override_bs=override_bs)


def _join_ranks_on_cpu(device: str) -> None:
    """Make ranks that were launched on CPUs know of each other, which HFLM's Accelerator does only with GPUs."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and torch.device(device).type == "cpu" and not PartialState._shared_state:
        PartialState(cpu=True, timeout=timedelta(weeks=52))  # HFLM's own timeout: ranks wait for the slowest


def _merge(parts: list[Any]) -> Any:
    """Merge dicts of lists, nested to any depth: the first item of each part's list, then the second, and so on."""
    if isinstance(parts[0], dict):
        return {key: _merge([part[key] for part in parts]) for key in parts[0]}
    return in_turns(parts)


class HarnessLog(logging.Filter):
    """Drops messages of the harness about choices that we made, and counts the requests that it truncates."""

    # each says only that a default applies, or that something was done that we did on purpose
    EXPECTED = (
        "`pretrained` model kwarg is not of type `str`",
        "Passed an already-initialized model through `pretrained`",
        "is defined, but aggregation is not. using default",
        "is defined, but higher_is_better is not. using default",
    )

    def __init__(self) -> None:
        super().__init__()
        self.truncated = 0

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "exceeds model's maximum length" in message:
            self.truncated += 1  # the caller warns once, instead of thousands of lines
            return False
        return not any(text in message for text in self.EXPECTED)


@contextmanager
def harness_log() -> Iterator[HarnessLog]:
    """Within the context the harness's messages pass through a `HarnessLog`."""
    log = HarnessLog()
    loggers = [logging.getLogger(name) for name in ("lm_eval.models.huggingface", "lm_eval.api.task")]
    for logger in loggers:
        logger.addFilter(log)
    try:
        yield log
    finally:
        for logger in loggers:
            logger.removeFilter(log)


@contextmanager
def temporarily(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the context the attribute `name` of `owner` is `value`."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def restored(model: torch.nn.Module | None, *, progress: bool) -> Iterator[None]:
    """Restore the global random generators and `model`'s training mode afterwards; keep the harness quiet until then.

    Some tasks draw from the global generators, and the harness calls `model.eval()`, but a training run must not change
    because it is evaluated on its way. What the harness prints goes to stderr.
    """
    modes = {module: module.training for module in model.modules()} if model is not None else {}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002, the harness uses this one
    bars_were_on, prompt_bar = not datasets.are_progress_bars_disabled(), lm_eval.api.task.tqdm
    if not progress:
        datasets.disable_progress_bars()
        prompt_bar = functools.partial(prompt_bar, disable=True)
    # its bootstrap would fork a pool of processes for a single chunk of work
    parallel = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with (
            torch.random.fork_rng(devices=range(torch.cuda.device_count())),
            contextlib.redirect_stdout(sys.stderr),
            temporarily(lm_eval.api.task, "tqdm", prompt_bar),
        ):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        if bars_were_on:
            datasets.enable_progress_bars()
        if parallel is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = parallel
        for module, training in modes.items():
            module.training = training

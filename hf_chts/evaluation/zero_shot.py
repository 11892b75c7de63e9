"""Zero-shot (and few-shot) evaluation of a language model with the lm-eval harness."""

import copy
import logging
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_chts.baseline import baseline_of
from hf_chts.evaluation.checks import check_max_length, check_model, check_options
from hf_chts.evaluation.embedded_suite import EMBEDDED_TASKS, write_embedded_suite
from hf_chts.evaluation.packed import check_compute, nonzero_parameters, number_of_parameters, packed_model
from hf_chts.evaluation.suites import check_task_names, suite_averages, suite_tasks
from hf_chts.machine import on_cpu, version_of

if TYPE_CHECKING:
    from hf_chts.evaluation.harness import RankedHFLM
    from hf_chts.evaluation.harness_tasks import LoadedTasks

logger = logging.getLogger(__name__)

_LIBRARIES = ("hf_chts", "lm_eval", "transformers", "torch", "datasets", "tokenizers")


def evaluate_zero_shot(
    model_or_dir: PreTrainedModel | str | Path,
    suite: str = "embedded",
    *,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
    max_length: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    compute: str = "dense",
    revision: str = "main",
    task_data: str | Path | None = None,
    bootstrap_iters: int = 1000,
    progress: bool = False,
    unsealed: bool = False,
) -> dict[str, Any]:
    """Evaluate a causal language model on a suite of lm-eval tasks.

    The training mode of a live model and the global random generators are as before afterwards. With `accelerate
    launch`, all processes share the documents of a model from a directory or the Hub, and the result is empty on all
    ranks but the first; with `batch_size=1` it equals that of one process to the last digit (larger batches are padded
    differently). A live model is evaluated completely by each process.

    Args:
        model_or_dir: a live model, an exported directory (plain or packed), or a Hub id.
        suite: names of `hf_chts.evaluation.SUITES` and of harness tasks, separated by commas.
        tokenizer: a tokenizer, its directory or its Hub id; None for the one saved with the model.
        limit: number of documents per task, from its beginning; None for all of them.
        num_fewshot: number of examples before each question; None for each task's own, most often 0. The embedded tasks
            have none.
        batch_size: sequences per forward, or "auto" for as many as fit, at most 64.
        max_length: tokens of context; None for the model's `max_position_embeddings`. Set it to the length of training
            if the config allows for more.
        device: such as "cuda:1"; None for the first GPU, or the CPU if there is none or `accelerate launch` uses it.
            Not for a live model, which stays where it is.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16". Not for a live model.
        compute: "dense", or "sparse" for an export whose weights stay packed (`load_sparse`), in one process. Not for
            a live model.
        revision: branch, tag or commit of a Hub id.
        task_data: directory with data files of tasks (see task_data.py); tasks without a folder there are loaded as
            always.
        bootstrap_iters: resamples for the harness's standard errors of F1, Matthews correlation and perplexity.
        progress: show a line per task, and bars if stderr is a terminal.
        unsealed: accept a checkpoint without a seal, and one whose files have changed since it was sealed.

    Returns:
        A dict that `json` can write:

        - `model`, `suite`: as given.
        - `tasks`: {task: {metric: value, metric_stderr: its standard error}}, with `metric@filter` for metrics of a
          filter. Values and errors are the harness's; if it has no error, the jackknife's. Tasks that ask the same
          choice of labels in every document always have `acc`, `mcc` (Matthews correlation) and `balanced_acc`.
        - `trivial`: {task: {metric: score}}: the best constant answer, on the same documents, for tasks with labels;
          the accuracy of guessing for other tasks with choices.
        - `chance`: {task: accuracy of guessing}.
        - `labels`: {task: {"names": […], "confusion": rows of true, columns of predicted labels}}.
        - `averages`: of each suite, see `suite_averages`.
        - `samples`: {task: number of documents}, `data`: {task: folder of its local data}, `skipped`: {task: why}.
        - `truncated_requests`: how many requests lost the beginning of their context.
        - `documents`: {task: {"digest": of its documents, "without_each": {metric: its value without the i-th
          document}}}, for the paired errors of `compare_models`. `write_results` leaves it out.
        - `config`, `versions` ("unknown" for what has none), `seconds`.

    Raises:
        FileNotFoundError: there is no such directory or Hub model, it has no tokenizer, or a checkpoint has no seal.
        ValueError: an option is out of range, a name in `suite` is unknown, a checkpoint is damaged, or model and
            tokenizer do not belong together.
        ConnectionError: no task could be loaded.
    """
    check_options(limit, num_fewshot, batch_size, device, task_data)
    check_compute(compute)
    source: PreTrainedModel | str
    if isinstance(model_or_dir, PreTrainedModel):
        if tokenizer is None:
            raise ValueError("A live model has no tokenizer: pass tokenizer=.")
        if device is not None or dtype != "auto" or compute != "dense":
            raise ValueError(
                f"device={device!r}, dtype={dtype!r} and compute={compute!r} are for models loaded from a directory or "
                "the Hub: a live model is evaluated where and as it is."
            )
        source, live_model = model_or_dir, model_or_dir
        name = model_or_dir.name_or_path or type(model_or_dir).__name__
    else:
        source = check_model(model_or_dir, revision=revision, tokenizer=tokenizer is None, unsealed=unsealed)
        live_model = None
        name = str(model_or_dir)
    names = suite_tasks(suite)

    # late, because the harness takes seconds to import
    from hf_chts.evaluation import harness, harness_tasks, task_run

    began = time.perf_counter()
    bars = progress and sys.stderr.isatty()  # in a log file a bar would be one line of thousands of columns
    with (
        tempfile.TemporaryDirectory(prefix="hf_chts_suite_") as directory,
        harness.harness_log() as log,
        harness.restored(live_model, progress=bars),
    ):
        if set(names) & set(EMBEDDED_TASKS):
            write_embedded_suite(Path(directory) / "embedded")
        manager = harness_tasks.task_manager(names, Path(directory) / "embedded")
        check_task_names(names, manager.task_index)
        loaded = harness_tasks.load_tasks(
            manager,
            names,
            num_fewshot,
            limit=limit,
            task_data=Path(task_data) if task_data else None,
            written=Path(directory) / "local",
        )
        _check_loaded(loaded, suite, task_data)
        if compute == "sparse":
            assert isinstance(source, str)
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            source, device, dtype = packed_model(source, revision, device or default_device(), dtype), None, "auto"
        lm = harness.RankedHFLM(
            progress=bars,
            pretrained=source,
            backend="causal",
            tokenizer=_tokenizer(tokenizer),
            revision=revision,
            device=device or default_device(),
            dtype=dtype,
            batch_size=batch_size,
            max_length=max_length,
        )
        _check_fit(lm, max_length)
        result = task_run.run_tasks(lm, loaded, limit, bootstrap_iters, progress=progress)
        truncated = lm.total(log.truncated)
        if lm.rank != 0:
            return {}
    if truncated:
        logger.warning(
            "%d requests were longer than max_length=%d and lost the beginning of their context.",
            truncated,
            lm.max_length,
        )
    return {
        "model": name,
        "suite": suite,
        "tasks": result.tasks,
        "trivial": result.trivial,
        "chance": result.chance,
        "labels": result.labels,
        "averages": suite_averages(suite, result.tasks, result.trivial),
        "samples": result.samples,
        "data": loaded.local,
        "skipped": loaded.skipped,
        "truncated_requests": truncated,
        "documents": result.documents,
        "config": {
            "limit": limit,
            "num_fewshot": result.num_fewshot,
            "batch_size": batch_size,
            "max_length": lm.max_length,
            "prefix_token_id": lm.prefix_token_id,
            "compute": compute,
            "dtype": str(lm.model.dtype).removeprefix("torch."),
            "device": str(lm.device),
            "processes": lm.world_size,
            "parameters": number_of_parameters(lm.model),
            "nonzero_parameters": nonzero_parameters(lm.model),
            "baseline": baseline_of(lm.model.config),
            "bootstrap_iters": bootstrap_iters,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version_of(name) for name in _LIBRARIES},
            "tasks": result.versions,
        },
        "seconds": time.perf_counter() - began,
    }


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() and not on_cpu() else "cpu"


def _check_loaded(loaded: "LoadedTasks", suite: str, task_data: str | Path | None) -> None:
    for task, reason in loaded.skipped.items():
        logger.warning("Task %s is skipped: %s", task, reason)
    if not loaded.units:
        task, reason = next(iter(loaded.skipped.items()))
        hint = "" if task_data else " Without a network, there is suite='embedded'."
        raise ConnectionError(f"No task of suite={suite!r} could be loaded. {task}: {reason}.{hint}")
    if task_data and not loaded.local and not loaded.skipped:
        logger.warning("%s has no data for any of the tasks.", task_data)


def _tokenizer(tokenizer: PreTrainedTokenizerBase | str | Path | None) -> PreTrainedTokenizerBase | None:
    if isinstance(tokenizer, (str, Path)):
        return AutoTokenizer.from_pretrained(str(tokenizer))
    return copy.deepcopy(tokenizer)  # the harness gives it a padding token and a padding side


def _check_fit(lm: "RankedHFLM", max_length: int | None) -> None:
    """Raise ValueError where the harness would fail in the middle, or give meaningless figures."""
    rows = lm.model.get_input_embeddings().num_embeddings
    if len(lm.tokenizer) > rows:
        raise ValueError(
            f"The tokenizer has {len(lm.tokenizer)} tokens, the model only {rows} embeddings: "
            "they do not belong together."
        )
    if lm.prefix_token_id is None:
        raise ValueError(
            "The tokenizer has neither a beginning-of-sequence nor an end-of-sequence token, and a text's first "
            "token needs one before it to be predicted from: set tokenizer.eos_token."
        )
    check_max_length(max_length, getattr(lm.config, "max_position_embeddings", None))

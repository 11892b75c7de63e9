"""Zero-shot (and few-shot) evaluation of a language model with the lm-eval harness."""

import copy
import importlib.metadata
import logging
import platform
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_chts.evaluation.embedded_suite import EMBEDDED_TASKS, write_embedded_suite
from hf_chts.evaluation.model_source import check_model
from hf_chts.evaluation.suites import check_task_names, suite_tasks

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

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
    revision: str = "main",
    bootstrap_iters: int = 1000,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate a causal language model on a suite of lm-eval tasks.

    A live model is left as it was: its training mode, and the global random generators. Launched on several GPUs with
    `accelerate launch`, a model from a directory or the Hub is evaluated by all of them, and the result is empty on all
    ranks but the first.

    Args:
        model_or_dir: a live model, an exported directory, or a Hub id.
        suite: one of `hf_chts.evaluation.SUITES`, or names of suites and harness tasks with commas between them.
        tokenizer: a tokenizer, its directory or its Hub id; None: the one saved with the model. A live model needs one.
        limit: number of documents per task, from its beginning; None: all of them.
        num_fewshot: number of examples before each question; None: each task's own, most often 0. The embedded tasks
            have none.
        batch_size: sequences per forward, or "auto" for the most that fit.
        max_length: tokens of context; None: the model's `max_position_embeddings`. Set it to the training length
            if the config allows for more than the model was trained on.
        device: such as "cuda:1" for a model that is loaded here; None: the first GPU if there is one. A live model
            stays where it is.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16", for a model that is loaded here.
        revision: branch, tag or commit of a Hub id.
        bootstrap_iters: resamples for the standard errors that have no closed form (F1, Matthews correlation).
        progress: show progress bars. The harness shows one per task, of its prompts, in any case.

    Returns:
        A dict that `json` can write: `model`, `suite`, `tasks` {task: {metric: value, metric_stderr: its standard
        error}} (`metric@filter` for metrics behind a filter), `chance` {task: accuracy of guessing} and `samples`
        {task: number of documents}, `skipped` {task: why}, `truncated_requests` (questions that lost the beginning of
        their context), `config`, `versions`, `seconds`.

    Raises:
        FileNotFoundError: there is no such directory or Hub model, or it has no tokenizer; before anything is loaded.
        ValueError: an option is out of range, a name in `suite` is unknown, or model and tokenizer do not fit.
        ConnectionError: not one of the tasks has its data.
    """
    _check_options(limit, num_fewshot, batch_size)
    source: PreTrainedModel | str
    if isinstance(model_or_dir, PreTrainedModel):
        if tokenizer is None:
            raise ValueError("A live model does not know its tokenizer: pass tokenizer=.")
        if device is not None or dtype != "auto":
            raise ValueError(
                f"device={device!r} and dtype={dtype!r} are for models loaded from a directory or the Hub: "
                "a live model is evaluated where and as it is."
            )
        source, live_model = model_or_dir, model_or_dir
        name = model_or_dir.name_or_path or type(model_or_dir).__name__
    else:
        source, live_model = check_model(model_or_dir, revision=revision, tokenizer=tokenizer is None), None
        name = str(model_or_dir)
    names = suite_tasks(suite)

    # the harness takes seconds to import, and training needs this package's metrics without it
    from hf_chts.evaluation import harness

    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="hf_chts_suite_") as directory,
        harness.HarnessLog() as log,
        harness.undisturbed(live_model, progress=progress),
    ):
        if set(names) & set(EMBEDDED_TASKS):
            write_embedded_suite(Path(directory))
        manager = harness.task_manager(names, Path(directory))
        check_task_names(names, manager.task_index)
        tasks, skipped = harness.load_tasks(manager, names, num_fewshot)
        for task, reason in skipped.items():
            logger.warning("Task %s is skipped: %s", task, reason)
        if not tasks["tasks"]:
            raise ConnectionError(
                f"No task of suite={suite!r} could be loaded. {next(iter(skipped))}: "
                f"{next(iter(skipped.values()))}. Without a network, use suite='embedded'."
            )
        lm = harness.ProgressHFLM(
            progress=progress,
            pretrained=source,
            backend="causal",
            tokenizer=_tokenizer(tokenizer),
            revision=revision,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            dtype=dtype,
            batch_size=batch_size,
            max_length=max_length,
        )
        _check_fit(lm, max_length)
        raw = harness.evaluate(lm=lm, task_dict=tasks, limit=limit, bootstrap_iters=bootstrap_iters, log_samples=False)
        if raw is None:
            return {}
        chance = harness.chance_accuracies(tasks["tasks"])
        if log.truncated:
            logger.warning(
                "%d requests were longer than max_length=%d and lost the beginning of their context.",
                log.truncated,
                lm.max_length,
            )
    return {
        "model": name,
        "suite": suite,
        "tasks": {task: scores for task, entry in raw["results"].items() if (scores := _scores(entry))},
        "chance": chance,
        "samples": {task: count["effective"] for task, count in raw["n-samples"].items()},
        "skipped": skipped,
        "truncated_requests": log.truncated,
        "config": {
            "limit": limit,
            "num_fewshot": dict(raw["n-shot"]),
            "batch_size": batch_size,
            "max_length": lm.max_length,
            "prefix_token_id": lm.prefix_token_id,
            "dtype": str(lm.model.dtype).removeprefix("torch."),
            "device": str(lm.device),
            "parameters": lm.model.num_parameters(),
            "bootstrap_iters": bootstrap_iters,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
            "tasks": dict(raw["versions"]),
        },
        "seconds": time.perf_counter() - began,
    }


def _check_options(limit: int | None, num_fewshot: int | None, batch_size: int | str) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: use at least 1 document per task, or None for all.")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot={num_fewshot}: use 0 or more examples, or None for each task's own number.")
    if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size >= 1):
        raise ValueError(f"batch_size={batch_size!r}: use 1 or more sequences, or 'auto'.")


def _tokenizer(tokenizer: PreTrainedTokenizerBase | str | Path | None) -> PreTrainedTokenizerBase | None:
    if isinstance(tokenizer, (str, Path)):
        return AutoTokenizer.from_pretrained(str(tokenizer))
    return copy.deepcopy(tokenizer)  # the harness gives it a padding token and a padding side


def _check_fit(lm: "HFLM", max_length: int | None) -> None:
    """Raise a ValueError where the harness would fail in the middle, or go on with figures that mean nothing."""
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
    positions = getattr(lm.config, "max_position_embeddings", None)
    if max_length is not None and not 1 <= max_length <= (positions or max_length):
        raise ValueError(f"max_length={max_length}: use from 1 to {positions} tokens, the model's context.")


def _scores(entry: dict[str, Any]) -> dict[str, float]:
    """The harness's {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...} as {"acc": 0.5, "acc_stderr": 0.1}."""
    scores = {}
    for key, value in entry.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or not isinstance(value, (int, float)):
            continue  # not a metric, or "N/A" for a standard error that the harness cannot give
        base = metric.removesuffix("_stderr")
        at = "" if filter_name == "none" else f"@{filter_name}"
        scores[f"{base}{at}{'_stderr' if base != metric else ''}"] = float(value)
    return scores

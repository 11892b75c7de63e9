"""The metadata of a model card, which the Hub's search, data set pages and leaderboards read."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_chts.export.auto_class import class_to_load
from hf_chts.export.model_facts import ModelFacts

TASK = "text-generation"  # the Hub's name for what a causal LM does
# the Hub's names for other tasks, by what follows AutoModelFor
_TASKS = {
    "CausalLM": TASK,
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "ImageClassification": "image-classification",
    "SemanticSegmentation": "image-segmentation",
    "ObjectDetection": "object-detection",
    "ImageTextToText": "image-text-to-text",
    "AudioClassification": "audio-classification",
    "SpeechSeq2Seq": "automatic-speech-recognition",
    "CTC": "automatic-speech-recognition",
}

_EMBEDDED = "Python standard library sources (embedded corpus of hf_chts)"


def card_data(
    facts: ModelFacts, *, training: Mapping[str, Any], metrics: Mapping[str, Any], metadata: Mapping[str, Any]
) -> ModelCardData:
    """Tags, data sets and a `model-index` of `metrics`; see `model_card`.

    A model trained from scratch has no `base_model`.
    """
    task = _TASKS.get(class_to_load(facts.architecture).removeprefix("AutoModelFor"))
    corpus = str(training.get("dataset", ""))
    given = dict(metadata)
    datasets = [*filter(None, [_hub_id(corpus)]), *as_list(given.pop("datasets", None))]
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": list(dict.fromkeys([*_tags(facts), *as_list(given.pop("tags", None))])),
        "datasets": list(dict.fromkeys(datasets)) or None,
    }
    results = _validation_results(metrics, corpus, task or TASK)
    if results:
        # the Hub groups results by the model's name
        fields |= {"model_name": f"{facts.architecture}-{facts.sparsity.method}", "eval_results": results}
    try:
        return ModelCardData(**(fields | given))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata of the model card: {error}") from error


def _hub_id(corpus: str) -> str | None:
    """The name of a data set that can be on the Hub; None for the embedded corpus and local files."""
    if corpus in ("", "embedded") or corpus.startswith((".", "/", "~")) or Path(corpus).exists():
        return None
    try:
        validate_repo_id(corpus)
    except HFValidationError:
        return None
    return corpus


def _validation_results(metrics: Mapping[str, Any], corpus: str, task: str) -> list[EvalResult]:
    """The finite figures measured on the validation data of `corpus`, in the form of the Hub's `model-index`."""
    known = _hub_id(corpus)
    name = _EMBEDDED if corpus == "embedded" else corpus if known else Path(corpus).name or "validation data"
    return [
        EvalResult(
            task_type=task,
            dataset_type=known or ("embedded" if corpus == "embedded" else "local"),
            dataset_name=name,
            dataset_split="validation",
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=value,
        )
        for metric, value in metrics.items()
        if is_figure(value)
    ]


def merged_results(old: Iterable[EvalResult] | None, new: Iterable[EvalResult]) -> list[EvalResult]:
    """The `new` results, after those `old` ones that they do not replace: of other data or another metric."""
    new = list(new)
    measured = {(result.unique_identifier, result.metric_type) for result in new}
    return [item for item in old or [] if (item.unique_identifier, item.metric_type) not in measured] + new


def is_figure(value: Any) -> bool:
    """Whether a value can stand in the metadata, which takes finite numbers only."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tags(facts: ModelFacts) -> list[str]:
    kind = ["dense-baseline"] if facts.sparsity.is_dense else ["sparse", "dynamic-sparse-training"]
    return ["hf_chts", *kind, facts.sparsity.method]


def as_list(value: str | Iterable[str] | None) -> list[str]:
    """The names that someone gave as one string, as several, or not at all."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)

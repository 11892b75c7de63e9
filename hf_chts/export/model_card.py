"""The README.md of an export or a checkpoint."""

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import Environment
from markupsafe import Markup

from hf_chts.config import SparsityConfig, differs
from hf_chts.export.auto_class import class_to_load, preprocessor
from hf_chts.export.card_metadata import card_data, is_figure
from hf_chts.export.model_facts import ModelFacts
from hf_chts.export.weight_files import read_json
from hf_chts.markdown import environment, with_section

_LOADING = "How to load it"
_STATE_NAME = "trainer_state.json"
_EVAL = "eval_"
# logged by an evaluation, and not about the model
_TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")

# the fields of config.json that say how large the model is and what it reads
_ARCHITECTURE = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "n_embd", "n_layer", "n_head", "d_model", "d_ff", "num_layers", "num_heads"),
    *("vocab_size", "max_position_embeddings", "n_positions", "tie_word_embeddings"),
)


def model_card(
    facts: ModelFacts,
    *,
    training: Mapping[str, Any],
    metrics: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Markdown with Hub metadata: what the model is, how to load it, its sparsity by kind of layer, and the recipe.

    Args:
        training: the recipe: name → value. Its `dataset`, if that is a Hub id, goes into the metadata.
        metrics: what was measured on the validation data: name → value; the numbers go into the `model-index`.
        metadata: fields of `huggingface_hub.ModelCardData` to add or to replace: license, language, base_model,
            model_name …; `tags` and `datasets` are added to those that are known.

    Raises:
        ValueError: `metadata` has a value that its field does not take.
    """
    data = card_data(facts, training=training, metrics=metrics, metadata=metadata or {})
    size = {name: facts.config[name] for name in _ARCHITECTURE if facts.config.get(name) is not None}
    config = facts.sparsity
    text = (
        _templates()
        .get_template("model_card.md.jinja")
        .render(
            metadata=Markup(data.to_yaml()),
            facts=facts,
            sparsity=config,
            # not before the schedule has ended, nor where layers have a sparsity of their own
            reached=not config.evolves or not differs(facts.missing, config.sparsity),
            sections={"Architecture": size, "Training": training, "Measured": metrics},
            loading_title=_LOADING,
            **_loading(facts.architecture, packed=facts.packed),
        )
    )
    return str(ModelCard(text))


def checkpoint_card(
    directory: Path, *, sparsity: SparsityConfig | None = None, training: Mapping[str, Any] | None = None
) -> str:
    """The model card of an export or checkpoint that has none.

    With a trainer_state.json it says at which step it was written, and what the last evaluation until then measured.

    Args:
        sparsity: for a directory that has no sparsity_config.json.
        training: the recipe, to which the step is added.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged.
    """
    state = read_json(directory / _STATE_NAME) if (directory / _STATE_NAME).is_file() else {}
    return run_card(ModelFacts.of_directory(directory, sparsity), state, training=training or {})


def run_card(
    facts: ModelFacts,
    state: Mapping[str, Any],
    *,
    training: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """The model card of a run as far as it has come: the recipe, the step, and what the last evaluation measured.

    Args:
        state: what trainer_state.json holds of a TrainerState.
        training, metadata: see `model_card`.
    """
    steps = progress(state.get("global_step"), state.get("max_steps"))
    training = {**training, **({"optimizer steps": steps} if steps else {})}
    return model_card(
        facts, training=training, metrics=last_evaluation(state.get("log_history") or []), metadata=metadata
    )


def progress(step: Any, of: Any) -> str | None:
    """Such as "500 of 10000"; the number alone at the end of a run."""
    if not isinstance(step, int) or not step:
        return None
    return f"{step} of {of}" if isinstance(of, int) and of > step else str(step)


def last_evaluation(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The figures of the last evaluation that a Trainer logged, by their names without "eval_"."""
    for entry in reversed(log_history):
        found = {name.removeprefix(_EVAL): value for name, value in entry.items() if name.startswith(_EVAL)}
        if found:
            return {name: value for name, value in found.items() if name not in _TIMES and is_figure(value)}
    return {}


def with_loading(card: str, architecture: str | None, *, packed: bool) -> str:
    """A card whose section on loading is for a packed, or a plain, directory; a card without that section as it is."""
    if f"\n## {_LOADING}\n" not in card:
        return card
    body = _templates().get_template("loading.md.jinja").render(_loading(architecture, packed=packed))
    return with_section(card, _LOADING, body)


def _loading(architecture: str | None, *, packed: bool) -> dict[str, Any]:
    reader = preprocessor(architecture)
    variable = reader.removeprefix("Auto").lower()
    return {"loader": class_to_load(architecture), "reader": reader, "variable": variable, "packed": packed}


def _templates() -> Environment:
    templates = environment("hf_chts.export")
    templates.filters["value_text"] = _value_text
    return templates


def _value_text(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str) and Path(value).is_absolute():
        value = Path(value).name  # a card is for everybody, and this machine's folders are not
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""The README.md of an export."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import Environment
from markupsafe import Markup

from hf_chts.config import differs
from hf_chts.export.auto_class import class_to_load, preprocessor
from hf_chts.export.card_metadata import card_data
from hf_chts.export.model_facts import ModelFacts
from hf_chts.markdown import environment, with_section

_LOADING = "How to load it"

# the fields of config.json that say how large the model is and what it reads
_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "n_embd",
    "n_layer",
    "n_head",
    "d_model",
    "d_ff",
    "num_layers",
    "num_heads",
    "vocab_size",
    "max_position_embeddings",
    "n_positions",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class LayerKind:
    """Sparse layers of one name and shape (out, in), with their links together."""

    name: str
    shape: tuple[int, int]
    number: int
    links: int

    @property
    def sparsity(self) -> float:
        return 1 - self.links / (self.number * self.shape[0] * self.shape[1])


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
            kinds=_kinds(facts),
            # not before the schedule has ended, nor where layers have a sparsity of their own
            reached=not config.evolves or not differs(facts.missing, config.sparsity),
            sections={"Architecture": size, "Training": training, "Measured": metrics},
            loading_title=_LOADING,
            **_loading(facts.architecture, packed=facts.packed),
        )
    )
    return str(ModelCard(text))


def with_loading(card: str, architecture: str | None, *, packed: bool) -> str:
    """The model card of a packed or plain directory, from that of the other; any other text stays as it is."""
    if f"\n## {_LOADING}\n" not in card:
        return card
    body = _templates().get_template("loading.md.jinja").render(_loading(architecture, packed=packed))
    return with_section(card, _LOADING, body)


def _loading(architecture: str | None, *, packed: bool) -> dict[str, Any]:
    reader = preprocessor(architecture)
    variable = reader.removeprefix("Auto").lower()
    return {"loader": class_to_load(architecture), "reader": reader, "variable": variable, "packed": packed}


def _kinds(facts: ModelFacts) -> list[LayerKind]:
    links: dict[tuple[str, tuple[int, int]], list[int]] = {}
    for layer in facts.layers:
        links.setdefault((layer.kind, layer.shape), []).append(layer.links)
    return [LayerKind(name, shape, len(each), sum(each)) for (name, shape), each in links.items()]


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

"""The README.md of an export."""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hf_chts.config import differs
from hf_chts.export.auto_class import class_to_load, preprocessor
from hf_chts.export.card_metadata import card_data
from hf_chts.export.model_facts import ModelFacts
from hf_chts.markdown import code, inline

_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ summary }}

## How to load it

{{ loading }}

## Sparsity

{{ sparsity }}
{{ sections }}"""

_HEADING = "## How to load it\n"

# of config.json, those that say how large the model is and what it reads
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

_PLAIN = """\
```python
from transformers import {loader}, {reader}

model = {loader}.from_pretrained(DIRECTORY_OR_HUB_ID)
{variable} = {reader}.from_pretrained(DIRECTORY_OR_HUB_ID)
```

The weights are ordinary dense tensors in which the missing links are exactly 0, so nothing but `transformers` is
needed, and nothing is faster or smaller than a dense model of the same shape. `masks.safetensors` holds the topology
as bits; `hf_chts.load_sparse` loads both, to train on."""

_PACKED = """\
```python
import hf_chts  # pip install hf_chts; transformers refuses to load the model without it
from transformers import {loader}, {reader}

model = {loader}.from_pretrained(DIRECTORY_OR_HUB_ID)
{variable} = {reader}.from_pretrained(DIRECTORY_OR_HUB_ID)
```

The weights are packed: of each sparse layer, one bit a weight says where its links are, and only their values are
stored. Loaded, they are the dense tensors of the model that was exported, bit for bit, in which the missing links are
exactly 0. `hf_chts.load_sparse` loads the model with its topology, to train on; `python -m hf_chts unpack DIR OUT`
makes a directory that needs nothing but `transformers`."""


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
        metadata: fields of `huggingface_hub.ModelCardData` to add, or to have instead: license, language, base_model,
            model_name …; `tags` and `datasets` are added to those that are known.

    Raises:
        ValueError: `metadata` has a value that is none of that field.
    """
    method, name = facts.sparsity.method, inline(facts.architecture)
    if facts.sparsity.is_dense:
        summary = f"A dense {name} trained with `hf_chts`, as a baseline."
    else:
        summary = (
            f"A {name} pretrained sparse from the first step with `hf_chts`, method `{method}`: "
            f"{facts.missing:.2%} of the weights of its {len(facts.layers)} sparse layers are missing links."
        )
    size = {name: facts.config[name] for name in _ARCHITECTURE if facts.config.get(name) is not None}
    sections = _section("Architecture", size) + _section("Training", training) + _section("Measured", metrics)
    card = ModelCard.from_template(
        card_data(facts, training=training, metrics=metrics, metadata=metadata or {}),
        template_str=_TEMPLATE,
        title=f"{name} · {method}",
        summary=summary,
        loading=_loading(facts.architecture, packed=facts.packed),
        sparsity=_sparsity_table(facts),
        sections=sections,
    )
    return str(card)


def with_loading(card: str, architecture: str | None, *, packed: bool) -> str:
    """The model card of a packed or plain directory, from that of the other; any other text stays as it is."""
    before, heading, after = card.partition(_HEADING)
    if not heading:
        return card
    _, next_heading, rest = after.partition("\n## ")
    return f"{before}{heading}\n{_loading(architecture, packed=packed)}\n{next_heading}{rest}"


def _loading(architecture: str | None, *, packed: bool) -> str:
    reader = preprocessor(architecture)
    names = {"loader": class_to_load(architecture), "reader": reader}
    return (_PACKED if packed else _PLAIN).format(variable=reader.removeprefix("Auto").lower(), **names)


def _sparsity_table(facts: ModelFacts) -> str:
    if not facts.layers:
        return "All layers are dense."
    kinds: dict[tuple[str, tuple[int, int]], list[int]] = {}
    for layer in facts.layers:
        kinds.setdefault((layer.kind, layer.shape), []).append(layer.links)
    lines = ["| layers | number | shape (out × in) | links in all | sparsity |", "| --- | --- | --- | --- | --- |"]
    for (kind, shape), links in kinds.items():
        possible = len(links) * shape[0] * shape[1]
        size = f"{len(links)} | {shape[0]} × {shape[1]} | {sum(links):,}"
        lines.append(f"| {code(kind)} | {size} | {1 - sum(links) / possible:.2%} |")
    lines.append(f"| all sparse layers | {len(facts.layers)} | | {facts.links:,} | {facts.missing:.2%} |")
    return "\n".join([*lines, "", _topology(facts)])


def _topology(facts: ModelFacts) -> str:
    """How the topology came about, in a sentence."""
    config = facts.sparsity
    parts = [f"initial topology `{config.initial_topology}`"]
    if config.sparsity_schedule != "constant":
        parts.append(
            f"sparsity from {config.initial_sparsity:.0%} to {config.sparsity:.0%} ({config.sparsity_schedule})"
        )
    if config.evolves:
        removal = f"removal by `{config.removal}` ({config.removal_choice})"
        parts += [removal] if not config.selects else []
        parts.append(f"regrowth by `{config.regrowth}` ({config.regrowth_choice})")
        parts.append(f"updates every {config.update_interval} steps until {config.update_until:.0%} of the run")
    else:
        parts.append("never changed")
    text = f"Topology: {', '.join(parts)}. `sparsity_config.json` has every setting."
    # before the schedule has ended, or where layers have a sparsity of their own
    if config.evolves and differs(facts.missing, config.sparsity):
        text += f" A sparsity of {config.sparsity:.2%} was asked for of the model; {facts.missing:.2%} is what it has."
    return text


def _section(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    rows = "\n".join(f"| {_shown(name)} | {_shown(value)} |" for name, value in values.items())
    return f"\n## {title}\n\n| | |\n| --- | --- |\n{rows}\n"


def _shown(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str) and Path(value).is_absolute():
        value = Path(value).name  # a card is for everybody, and this machine's folders are not
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return inline(text)

"""The README.md of an export."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_chts.export.auto_class import auto_class
from hf_chts.layers.patching import SparseModel

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

_PLAIN = """\
```python
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained(DIRECTORY_OR_HUB_ID)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY_OR_HUB_ID)
```

The weights are ordinary dense tensors in which the missing links are exactly 0, so nothing but `transformers` is
needed, and nothing is faster or smaller than a dense model of the same shape. `masks.safetensors` holds the topology
as bits; `hf_chts.load_sparse` loads both, to train on."""

_PACKED = """\
```python
import hf_chts  # pip install hf_chts; transformers refuses to load the model without it
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained(DIRECTORY_OR_HUB_ID)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY_OR_HUB_ID)
```

The weights are packed: of each sparse layer, one bit a weight says where its links are, and only their values are
stored. Loaded, they are the dense tensors of the model that was exported, bit for bit, in which the missing links are
exactly 0. `hf_chts.load_sparse` loads the model with its topology, to train on; `python -m hf_chts unpack DIR OUT`
makes a directory that needs nothing but `transformers`."""


def model_card(sparse: SparseModel, *, training: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    """Markdown with Hub metadata: what the model is, how to load it, its sparsity by kind of layer, and the recipe."""
    config = sparse.config
    name = type(sparse.model).__name__
    loaded_by = auto_class(name).__name__
    task = "text-generation" if loaded_by == "AutoModelForCausalLM" else None
    data = ModelCardData(library_name="transformers", pipeline_tag=task, tags=_tags(sparse))
    if config.is_dense:
        summary = f"A dense {name} trained with `hf_chts`, as a baseline."
    else:
        summary = (
            f"A {name} pretrained sparse from the first step with `hf_chts`, method `{config.method}`: "
            f"{sparse.sparsity():.2%} of the weights of its {len(sparse.layers)} sparse layers are missing links."
        )
    sections = _section("Training", training) + _section("Measured", metrics)
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=f"{name} · {config.method}",
        summary=summary,
        loading=_PLAIN.format(loader=loaded_by),
        sparsity=_sparsity_table(sparse),
        sections=sections,
    )
    return str(card)


def with_loading(card: str, loader: str, *, packed: bool) -> str:
    """The model card of a packed or plain directory, from that of the other; any other text stays as it is."""
    before, heading, after = card.partition(_HEADING)
    if not heading:
        return card
    _, next_heading, rest = after.partition("\n## ")
    return f"{before}{heading}\n{(_PACKED if packed else _PLAIN).format(loader=loader)}\n{next_heading}{rest}"


def _tags(sparse: SparseModel) -> list[str]:
    kind = ["dense-baseline"] if sparse.config.is_dense else ["sparse", "dynamic-sparse-training"]
    return ["hf_chts", *kind, sparse.config.method]


def _sparsity_table(sparse: SparseModel) -> str:
    if not sparse.layers:
        return "All layers are dense."
    kinds: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for name, layer in sparse.layers.items():
        kinds.setdefault((name.rsplit(".", 1)[-1], tuple(layer.topology.shape)), []).append(layer.links)
    lines = ["| layers | number | shape (out × in) | links in all | sparsity |", "| --- | --- | --- | --- | --- |"]
    for (kind, shape), links in kinds.items():
        possible = len(links) * shape[0] * shape[1]
        lines.append(
            f"| `{kind}` | {len(links)} | {shape[0]} × {shape[1]} | {sum(links):,} | {1 - sum(links) / possible:.2%} |"
        )
    lines.append(f"| all sparse layers | {len(sparse.layers)} | | {sparse.links():,} | {sparse.sparsity():.2%} |")
    return "\n".join(lines)


def _section(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    rows = "\n".join(f"| {name} | {_shown(value)} |" for name, value in values.items())
    return f"\n## {title}\n\n| | |\n| --- | --- |\n{rows}\n"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

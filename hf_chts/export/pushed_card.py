"""What is added to the model card of a directory before it is pushed: results, figures, the repository's name."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

import yaml
from huggingface_hub import ModelCard, ModelCardData

from hf_chts.export.card_metadata import merged_results
from hf_chts.export.zero_shot_results import TITLE, eval_results, results_section
from hf_chts.markdown import picture, with_section

FIGURES = "figures"  # the folder of an export that holds them
PLACEHOLDER = "DIRECTORY_OR_HUB_ID"


def with_results(card: str, results: Mapping[str, Any]) -> str:
    """A card with a section of zero-shot results, and the same in its `model-index`; earlier ones are replaced.

    Raises:
        ValueError: the card's metadata cannot be read.
    """
    parsed = _parsed(card)
    data = cast(ModelCardData, parsed.data)
    data.model_name = data.model_name or _title(parsed.text)
    data.eval_results = merged_results(data.eval_results, eval_results(results))
    parsed.text = with_section(parsed.text, TITLE, results_section(results))
    return str(parsed)


def with_figures(card: str, names: Iterable[str]) -> str:
    """A card with a section that shows the files of these names in the folder of figures."""
    lines = [picture(name.rsplit(".", 1)[0].replace("_", " "), FIGURES, name) for name in names]
    return with_section(card, "Figures", "\n\n".join(lines)) if lines else card


def with_repository(card: str, repo_id: str, revision: str | None) -> str:
    """A card whose code can be copied and run: it names this repository."""
    source = f'"{repo_id}"' if revision in (None, "main") else f'"{repo_id}", revision={json.dumps(revision)}'
    return card.replace(PLACEHOLDER, source)


def check_card(card: str) -> None:
    """Raises ValueError if the metadata of a card cannot be read."""
    _parsed(card)


def _parsed(card: str) -> ModelCard:
    try:
        return ModelCard(card)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata at the head of the model card cannot be read: {error}") from error


def _title(text: str) -> str:
    """The first heading of a card."""
    return next((line.removeprefix("# ").strip() for line in text.splitlines() if line.startswith("# ")), "model")

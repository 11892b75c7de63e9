"""The model card of a checkpoint, made of what its files say about the model and its training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_chts.config import SparsityConfig
from hf_chts.export.card_metadata import is_figure
from hf_chts.export.model_card import model_card
from hf_chts.export.model_facts import ModelFacts
from hf_chts.export.weight_files import read_json

STATE_NAME = "trainer_state.json"

_EVAL = "eval_"
# logged by an evaluation, and not about the model
_TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")


def checkpoint_card(
    directory: Path,
    *,
    sparsity: SparsityConfig | None = None,
    training: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """The model card of a directory that has none.

    Args:
        directory: an export, or a checkpoint of SparseTrainer; with a trainer_state.json the card says at which step of
            the run it was written, and what the last evaluation until then measured.
        sparsity: for a directory that has no sparsity_config.json.
        training: the recipe, beside the step.
        metadata: see `model_card`.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged.
    """
    state = read_json(directory / STATE_NAME) if (directory / STATE_NAME).is_file() else {}
    steps = progress(state.get("global_step"), state.get("max_steps"))
    return model_card(
        ModelFacts.of_directory(directory, sparsity),
        training={**(training or {}), **({"optimizer steps": steps} if steps else {})},
        metrics=last_evaluation(state.get("log_history") or []),
        metadata=metadata,
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

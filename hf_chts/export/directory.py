"""A plain Hugging Face directory of a sparse model, and back."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_chts.checkpoint import TopologyState, load_masks, save_masks
from hf_chts.config import CONFIG_NAME, SparsityConfig
from hf_chts.export.model_card import model_card
from hf_chts.layers.patching import SparseModel, sparsify


def export_sparse(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    training: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
) -> Path:
    """Write a model that `sparsify` patched as a plain Hugging Face directory.

    The weights are dense tensors with exact zeros under the standard keys, so that `from_pretrained` and the lm-eval
    harness load them without hf_chts. Beside them: the tokenizer, `sparsity_config.json`, `masks.safetensors` and a
    model card.

    Args:
        training: the recipe, for the model card: name → value.
        metrics: what was measured on the model, for the model card: name → value.

    Returns:
        The directory.

    Raises:
        ValueError: the model was never sparsified.
        NotADirectoryError: `directory` is a file.
        RuntimeError: a weight is not 0 off its mask. Nothing is written then.
    """
    directory = Path(directory)
    sparse = SparseModel.of(model)
    if sparse is None:
        raise ValueError(
            "the model is not sparse: call sparsify(model, config) or train it with SparseTrainer; for a dense model "
            "without a config, model.save_pretrained() is all it takes"
        )
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file: export to a directory")
    sparse.check()
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    sparse.config.save(directory / CONFIG_NAME)
    save_masks(directory, TopologyState(sparse.masks()))
    card = model_card(sparse, training=training or {}, metrics=metrics or {})
    (directory / "README.md").write_text(card, encoding="utf-8")
    return directory


def load_sparse(directory: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load an export with its masks, to train on: the model is patched, `SparseModel.of(model)` is its handle.

    Only to use the model, `AutoModelForCausalLM.from_pretrained` is enough.

    Args:
        kwargs: for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: masks or config are missing, damaged or do not fit the weights.
    """
    config = SparsityConfig.load(directory)
    state = load_masks(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, **kwargs)
    for name, mask in state.masks.items():
        weight = model.get_parameter(f"{name}.weight").detach()
        if weight.shape == mask.shape and (weight[~mask.to(weight.device)] != 0).any():
            raise ValueError(
                f"{directory}: {name} has weights off its mask, so weights and masks are of different models: "
                "restore both from one export"
            )
    sparsify(model, config, masks=state.masks)
    return model

"""export_sparse: a Hugging Face directory of a sparse model, plain or packed."""

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_chts.checkpoint import MASKS_NAME, TopologyState, save_masks
from hf_chts.config import CONFIG_NAME
from hf_chts.export.adapters import Adapters, check_adapters, has_adapters, plain_model
from hf_chts.export.checksums import forget_checksums, write_checksums
from hf_chts.export.convert import SHARD_SIZE, pack_directory
from hf_chts.export.exported_values import check_values
from hf_chts.export.hub import push_directory
from hf_chts.export.model_card import model_card
from hf_chts.export.model_facts import ModelFacts
from hf_chts.export.packed_loading import forget_packing
from hf_chts.export.pushed_card import FIGURES, with_figures, with_results
from hf_chts.export.weight_files import PACKED_STEM, PLAIN_STEM, WeightFiles, remove_weights
from hf_chts.export.zero_shot_results import RESULTS_NAME, published
from hf_chts.files.atomic import write_whole
from hf_chts.files.full_disk import explain_failed_write
from hf_chts.layers.patching import SparseModel
from hf_chts.layers.wrappers import original_keys, original_name

_log = logging.getLogger(__name__)


def export_sparse(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    training: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
    metadata: dict[str, Any] | None = None,
    zero_shot: Mapping[str, Any] | None = None,
    figures: Iterable[str | Path] = (),
    packed: bool = False,
    max_shard_size: int | str = SHARD_SIZE,
    state_dict: dict[str, Tensor] | None = None,
    adapters: Adapters = "refuse",
    push_to_hub: bool = False,
    repo_id: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> Path:
    """Write a model that `sparsify` patched, wrapped or not, as a Hugging Face directory.

    Plain, the weights are dense tensors with exact zeros under the standard keys, so that `from_pretrained` and the
    lm-eval harness load them without hf_chts. Beside them: the tokenizer, `sparsity_config.json`, `masks.safetensors`
    and a model card.

    Packed, sparse weights are stored as the bits of their masks and the values of their links (packed_format.py), so
    there is no `masks.safetensors`. The directory loads with `load_sparse`, with `from_pretrained` where hf_chts is
    imported, and nowhere else: without it transformers raises. A plain directory is written beside it for a moment.

    Args:
        training: the recipe, for the model card: name → value; its `dataset`, a Hub id, also for the metadata.
        metrics: what was measured on the validation data, for the model card and its `model-index`: name → value.
        metadata: fields of `huggingface_hub.ModelCardData`, such as license, language and base_model.
        zero_shot: what `evaluate_zero_shot` returned for this model, for the model card; kept as `zero_shot.json`.
        figures: pictures for the model card; copied into the folder `figures`.
        max_shard_size: bytes, or "5GB", as in `save_pretrained`.
        state_dict: the whole weights, where those of the model are split over ranks (`SparseTrainer.whole_state_dict`).
        adapters: what becomes of the active PEFT adapters on the model, which stays as it is. "merge": they are added
            to the weights; layers that had one are dense then, and so are their masks. "merge_masked": they are added
            to the weights of links, and the masks stay; the rest of what they add is dropped. "leave_out": as if there
            were none. What that does to the sparsity, or how much is dropped, is logged and in the model card.
        push_to_hub: push the directory when it is written, as in `save_pretrained`; or use `push_directory`, later.
        repo_id: where to; None: the name of the directory, in your namespace.
        token, private, revision, commit_message: as in `push_directory`.

    Returns:
        The directory. Weights and zero-shot results of an earlier export in it are gone.

    Raises:
        ValueError: the model was never sparsified, is dense and to be packed, has adapters and `adapters` does not say
            what is to become of them, is quantized, or something else has taken hold of a weight. Nothing is written
            then.
        FloatingPointError: a weight is NaN or infinite. Nothing is written then.
        NotADirectoryError: `directory` is a file.
        FileNotFoundError: a figure is missing. Nothing is written then.
        RuntimeError: a weight is not 0 off its mask. Nothing is written then.
        OSError: the directory cannot be written; on a full disk the message says how much room there is.
        PushFailed: the Hub refuses, or cannot be reached. The directory is whole then.
    """
    directory, pictures = Path(directory), [Path(path) for path in figures]
    sparse = SparseModel.of(model)
    if sparse is None:
        raise ValueError(
            "the model is not sparse: call sparsify(model, config) or train it with SparseTrainer; for a dense model "
            "without a config, model.save_pretrained() is all it takes"
        )
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file: export to a directory")
    if packed and sparse.config.is_dense:
        raise ValueError("a dense model has nothing to pack: export it plain")
    settings: Any = getattr(sparse.model, "config", None)
    forget_packing(settings)
    if getattr(settings, "quantization_config", None) is not None:
        raise ValueError(
            "the config of the model has a quantization_config, and an export has plain weights alone: export a model "
            "that was not quantized, and quantize what is exported"
        )
    # before zeros are looked for, which NaN would be taken for something else by
    values = sparse.model.state_dict() if state_dict is None else state_dict
    buffers = [original_name(name) for name, _ in sparse.model.named_buffers()]
    check_values({original_name(key): value for key, value in values.items()}, buffers)
    adapted = has_adapters(model)
    check_adapters(model, adapters)
    if state_dict is not None:
        if adapted:
            raise ValueError(
                "state_dict is given for a model with PEFT adapters, whose weights cannot be told from it: save the "
                "adapters with model.save_pretrained, put them on the sparse model in one process, and export that"
            )
        state_dict = {original_name(key): value for key, value in state_dict.items()}
        _check_whole(sparse, state_dict)
    else:
        sparse.check()
    for path in pictures:
        if not path.is_file():
            raise FileNotFoundError(f"there is no figure {path}")
    masks = sparse.masks()
    if adapted:
        plain = plain_model(sparse, adapters)
        state_dict, masks = plain.state, plain.masks
        check_values(state_dict, buffers)
        training = {**(training or {}), "adapters": plain.said}
        _log.warning("%s: %s", directory, plain.said)
    facts = ModelFacts.of_model(sparse, masks)
    card = model_card(facts, training=training or {}, metrics=metrics or {}, metadata=metadata)
    if zero_shot is not None:
        card = with_results(card, zero_shot)
    card = with_figures(card, [path.name for path in pictures])
    with explain_failed_write(directory, "The model is as it was: make room, and export it again"):
        if packed:
            _write_packed(sparse, masks, directory, tokenizer, card, max_shard_size, state_dict)
        else:
            forget_checksums(directory)
            _write_plain(sparse, masks, directory, tokenizer, card, max_shard_size, state_dict)
            remove_weights(directory, PACKED_STEM)
            write_checksums(directory, PLAIN_STEM)
        _write_evidence(directory, zero_shot, pictures)
    if push_to_hub:
        push_directory(
            directory,
            repo_id or directory.resolve().name,
            token=token,
            private=private,
            revision=revision,
            commit_message=commit_message,
        )
    return directory


def _write_packed(
    sparse: SparseModel,
    masks: dict[str, Tensor],
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    card: str,
    max_shard_size: int | str,
    state_dict: dict[str, Tensor] | None,
) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as temporary:
        plain, new = Path(temporary) / "plain", Path(temporary) / "packed"
        _write_plain(sparse, masks, plain, tokenizer, card, max_shard_size, state_dict)
        stored = WeightFiles(plain, PLAIN_STEM).entries
        if not all(f"{name}.weight" in stored for name in masks):
            # packed are weights of layers, and not the pieces, by other names, that some architectures store; which
            # they load all the same
            remove_weights(plain, PLAIN_STEM)
            _write_plain(sparse, masks, plain, tokenizer, card, max_shard_size, state_dict, as_stored=False)
        transposed = [name for name, layer in sparse.layers.items() if layer.transposed]
        pack_directory(plain, new, max_shard_size=max_shard_size, transposed=transposed)
        directory.mkdir(exist_ok=True)
        forget_checksums(directory)
        for stem in (PLAIN_STEM, PACKED_STEM):
            remove_weights(directory, stem)
        (directory / MASKS_NAME).unlink(missing_ok=True)
        for path in sorted(
            new.iterdir(), key=lambda path: path.name == "config.json"
        ):  # which says what the others are
            os.replace(path, directory / path.name)


def _write_plain(
    sparse: SparseModel,
    masks: dict[str, Tensor],
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    card: str,
    max_shard_size: int | str,
    state_dict: dict[str, Tensor] | None,
    *,
    as_stored: bool = True,
) -> None:
    model: Any = sparse.model
    with original_keys(model), _without_peft(model):
        model.save_pretrained(
            directory, max_shard_size=max_shard_size, state_dict=state_dict, save_original_format=as_stored
        )
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    possible = sum(mask.numel() for mask in masks.values())
    links = sum(int(mask.count_nonzero()) for mask in masks.values())
    sparse.config.save(directory / CONFIG_NAME, measured=1 - links / possible if possible else None)
    save_masks(directory, TopologyState(masks))
    (directory / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def _without_peft(model: Any) -> Iterator[None]:
    """Have `save_pretrained` write the model, where `add_adapter` has told it to write the adapter alone."""
    loaded = vars(model).get("_hf_peft_config_loaded")
    try:
        if loaded:
            model._hf_peft_config_loaded = False
        yield
    finally:
        if loaded:
            model._hf_peft_config_loaded = True


def _write_evidence(directory: Path, zero_shot: Mapping[str, Any] | None, figures: list[Path]) -> None:
    """What the model card shows, beside the weights."""
    if zero_shot is None:
        (directory / RESULTS_NAME).unlink(missing_ok=True)  # of the model that was here before
    else:
        write_whole(directory / RESULTS_NAME, published(zero_shot))
    for path in figures:
        write_whole(directory / FIGURES / path.name, path.read_bytes())


def _check_whole(sparse: SparseModel, state_dict: dict[str, Tensor]) -> None:
    """As `SparseModel.check`, of weights that the model does not hold whole."""
    for name, layer in sparse.layers.items():
        weight = state_dict.get(f"{name}.weight")
        if weight is None or weight.shape != layer.mask.shape:
            found = "nothing" if weight is None else str(tuple(weight.shape))
            raise RuntimeError(f"state_dict has {found} for {name}.weight, which is {tuple(layer.mask.shape)}")
        if weight[~layer.mask.to(weight.device)].any():
            raise RuntimeError(f"{name} has weights off its mask in state_dict: something wrote past the mask")

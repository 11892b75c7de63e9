"""export_sparse: a Hugging Face directory of a sparse model, plain or packed."""

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_chts.checkpoint import MASKS_NAME, TopologyState, save_masks
from hf_chts.config import CONFIG_NAME
from hf_chts.export.activation_code import refuse_plain
from hf_chts.export.adapters import Adapters, check_adapters, has_adapters, plain_model
from hf_chts.export.checksums import forget_checksums, write_checksums
from hf_chts.export.convert import SHARD_SIZE, copy_others, pack_directory
from hf_chts.export.exported_values import check_values, off_mask
from hf_chts.export.hub import push_directory
from hf_chts.export.hub_files import CARD
from hf_chts.export.linked_weights import LinkedWeights
from hf_chts.export.model_card import model_card
from hf_chts.export.model_facts import ModelFacts
from hf_chts.export.packed_format import packed_config
from hf_chts.export.packed_loading import forget_packing
from hf_chts.export.pushed_card import FIGURES, with_figures, with_results
from hf_chts.export.weight_files import PACKED_STEM, PLAIN_STEM, WeightFiles, read_json, remove_weights
from hf_chts.export.zero_shot_results import RESULTS_NAME, published
from hf_chts.files.atomic import write_whole
from hf_chts.files.full_disk import explain_failed_write
from hf_chts.layers.packed_model import check_not_packed
from hf_chts.layers.wrappers import original_keys, original_name
from hf_chts.sparse_model import SparsityHandle

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

    A plain export has dense weights with exact zeros under the standard keys, so that `from_pretrained` and the lm-eval
    harness load it without hf_chts. Beside them are the tokenizer, `sparsity_config.json`, `masks.safetensors` and a
    model card.

    A packed export stores sparse weights as an index of their links and the values of their links (packed_format.py),
    without `masks.safetensors`. It loads with `load_sparse`, and with `from_pretrained` once hf_chts is imported;
    without it transformers raises. While it is written, a temporary plain copy takes space next to it.

    Args:
        training: the recipe for the model card, name → value; its `dataset`, if a Hub id, also goes into the metadata.
        metrics: validation figures for the model card and its `model-index`, name → value.
        metadata: fields of `huggingface_hub.ModelCardData`, such as license, language and base_model.
        zero_shot: what `evaluate_zero_shot` returned for this model, for the model card; kept as `zero_shot.json`.
        figures: pictures for the model card; copied into the folder `figures`.
        packed: write a packed export.
        max_shard_size: in bytes, or as "5GB", as in `save_pretrained`.
        state_dict: the complete weights, if the model's own are split over ranks (`SparseTrainer.whole_state_dict`).
        adapters: what to do with active PEFT adapters. "merge" adds them to the weights; adapted layers become dense,
            and so do their masks. "merge_masked" adds them to the links alone, and drops the rest. "leave_out" exports
            the model without them. The model itself does not change. The log and the model card say how the sparsity
            changes, or which share is dropped.
        push_to_hub: push the directory when it is written, as `push_directory` does.
        repo_id: where to push; None: the name of the directory, in your namespace.
        token, private, revision, commit_message: as in `push_directory`.

    Returns:
        The directory. Weights and zero-shot results of an earlier export in it are gone.

    Raises:
        ValueError: the model was never sparsified, is dense and should be packed, keeps only its largest activations
            and should not be packed, has adapters without a choice in `adapters`, is quantized, or a weight was
            replaced by something else. Nothing is written then.
        FloatingPointError: a weight is NaN or infinite. Nothing is written then.
        NotADirectoryError: `directory` is a file.
        FileNotFoundError: a figure is missing. Nothing is written then.
        RuntimeError: a weight is not 0 off its mask. Nothing is written then.
        OSError: the directory cannot be written; on a full disk the message says how much space there is.
        PushFailed: the Hub refuses or cannot be reached. The directory is complete then.
    """
    directory, pictures = Path(directory), [Path(path) for path in figures]
    sparse = SparsityHandle.of(model)
    check_not_packed(model, "exported")
    if sparse is None:
        raise ValueError(
            "the model is not sparse: call sparsify(model, config) or train it with SparseTrainer; for a dense model "
            "without a config, model.save_pretrained() is all it takes"
        )
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file: export to a directory")
    if not packed:
        refuse_plain(sparse.config.activation_topk, "export_sparse(…, packed=True), or --export packed")
    if packed and sparse.config.is_dense:
        raise ValueError("a dense model has nothing to pack: export it plain")
    settings: Any = getattr(sparse.model, "config", None)
    forget_packing(settings)
    if getattr(settings, "quantization_config", None) is not None:
        raise ValueError(
            "the config of the model has a quantization_config, and only plain weights can be exported: export the "
            "model before it is quantized, and quantize the export"
        )
    # before the zeros off the masks are checked, where NaN would give another error
    values = sparse.model.state_dict() if state_dict is None else state_dict
    buffers = [original_name(name) for name, _ in sparse.model.named_buffers()]
    check_values({original_name(key): value for key, value in values.items()}, buffers)
    adapted = has_adapters(model)
    check_adapters(model, adapters)
    if state_dict is not None:
        if adapted:
            raise ValueError(
                "state_dict cannot be used for a model with PEFT adapters: save the adapters with "
                "model.save_pretrained, load them on the sparse model in one process, and export that"
            )
        state_dict = {original_name(key): value for key, value in state_dict.items()}
        _check_whole(sparse, state_dict)
    else:
        sparse.check()
    for path in pictures:
        if not path.is_file():
            raise FileNotFoundError(f"there is no figure {path}")
    masks = sparse.topologies()
    linked = LinkedWeights(sparse, values) if sparse.config.storage == "links" and not adapted else None
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
    export = _Export(sparse, masks, tokenizer, card, max_shard_size, state_dict, linked)
    with explain_failed_write(directory, "The model did not change: make room, and export it again"):
        if packed:
            export.write_packed(directory)
        else:
            forget_checksums(directory)
            export.write_plain(directory)
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


@dataclass(frozen=True)
class _Export:
    """What is written; see `export_sparse`. `masks` are bool (out, in) by layer name, `card` is the model card."""

    sparse: SparsityHandle
    masks: Mapping[str, Tensor]
    tokenizer: PreTrainedTokenizerBase | None
    card: str
    max_shard_size: int | str
    state_dict: dict[str, Tensor] | None
    linked: LinkedWeights | None  # where layers keep their links in slots

    def write_plain(self, directory: Path, *, as_stored: bool = True, weights: bool = True) -> None:
        """Write a plain directory, without checksums.

        Args:
            as_stored: what `save_pretrained` does by default: some architectures store weights under other names, and
                cut in other pieces, than their layers have. Either form loads.
            weights: False leaves the weights out.
        """
        model: Any = self.sparse.model
        linked, state = self.linked, self.state_dict
        by_layer = linked is not None and (not as_stored or linked.layer_by_layer())
        if not weights or by_layer:
            state = {}
        elif linked is not None:
            state = linked.dense()
        with original_keys(model), _without_peft(model):
            model.save_pretrained(
                directory,
                max_shard_size=self.max_shard_size,
                state_dict=state,
                save_original_format=as_stored,
            )
        if weights and by_layer:
            assert linked is not None
            remove_weights(directory, PLAIN_STEM)
            linked.write(directory, packed=False, max_shard_size=self.max_shard_size)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)
        counts = [(mask.numel(), int(mask.count_nonzero())) for mask in self.masks.values()]
        possible, links = (sum(numbers) for numbers in zip(*counts, strict=True)) if counts else (0, 0)
        self.sparse.config.save(directory / CONFIG_NAME, measured=1 - links / possible if possible else None)
        shapes = {name: self.sparse.layers[name].storage.shape for name in self.masks}
        save_masks(directory, TopologyState(self.masks, shapes=shapes))
        (directory / CARD).write_text(self.card, encoding="utf-8")

    def write_packed(self, directory: Path) -> None:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as temporary:
            plain, new = Path(temporary) / "plain", Path(temporary) / "packed"
            if self.linked is not None:
                new.mkdir(parents=True)
                self.write_plain(plain, weights=False)
                self.linked.write(new, packed=True, max_shard_size=self.max_shard_size)
                write_checksums(new, PACKED_STEM)
                contents = packed_config(read_json(plain / "config.json"), self.sparse.config.links_pattern)
                copy_others(plain, new, contents, packed=True)
            else:
                self.write_plain(plain)
                stored = WeightFiles(plain, PLAIN_STEM).entries
                if not all(f"{name}.weight" in stored for name in self.masks):  # packing needs the weights of layers
                    remove_weights(plain, PLAIN_STEM)
                    self.write_plain(plain, as_stored=False)
                transposed = [name for name, layer in self.sparse.layers.items() if layer.transposed]
                pack_directory(plain, new, max_shard_size=self.max_shard_size, transposed=transposed)
            directory.mkdir(exist_ok=True)
            forget_checksums(directory)
            for stem in (PLAIN_STEM, PACKED_STEM):
                remove_weights(directory, stem)
            (directory / MASKS_NAME).unlink(missing_ok=True)
            # config.json last: it says how to read the others
            for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, directory / path.name)


@contextmanager
def _without_peft(model: Any) -> Iterator[None]:
    """Make `save_pretrained` write the model, and not the adapter alone as it does after `add_adapter`."""
    loaded = vars(model).get("_hf_peft_config_loaded")
    try:
        if loaded:
            model._hf_peft_config_loaded = False
        yield
    finally:
        if loaded:
            model._hf_peft_config_loaded = True


def _write_evidence(directory: Path, zero_shot: Mapping[str, Any] | None, figures: list[Path]) -> None:
    """Write the results and figures that the model card shows."""
    if zero_shot is None:
        (directory / RESULTS_NAME).unlink(missing_ok=True)  # results of an earlier model
    else:
        write_whole(directory / RESULTS_NAME, published(zero_shot))
    for path in figures:
        write_whole(directory / FIGURES / path.name, path.read_bytes())


def _check_whole(sparse: SparsityHandle, state_dict: dict[str, Tensor]) -> None:
    """As `SparsityHandle.check`, for weights that are given as a complete state dict."""
    for name, layer in sparse.layers.items():
        key, shape = f"{name}.{layer.parameter_name}", layer.storage.parameter_shape
        weight = state_dict.get(key)
        if weight is None or weight.shape != shape:
            found = "nothing" if weight is None else str(tuple(weight.shape))
            raise RuntimeError(f"state_dict has {found} for {key}, which is {tuple(shape)}")
        if off_mask(weight, ~layer.storage.missing()):
            raise RuntimeError(f"{name} has weights off its mask in state_dict: something ignored the mask")

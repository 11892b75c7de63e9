"""Convert plain directories to packed ones and back, with one tensor in memory at a time."""

import json
import math
import shutil
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_chts.checkpoint import HISTORY_NAME, MASKS_NAME, MaskFile, mask_metadata
from hf_chts.checkpoint.seal import SEAL_NAME
from hf_chts.config import SparsityConfig
from hf_chts.export import packed_format, packed_index
from hf_chts.export.activation_code import activations_of, refuse_plain
from hf_chts.export.auto_class import empty_model
from hf_chts.export.checksums import CHECKSUMS_NAME, verify_checksums, write_checksums
from hf_chts.export.exported_values import check_stored, check_zeros
from hf_chts.export.model_card import with_loading
from hf_chts.export.packed_files import PackedFiles
from hf_chts.export.packed_format import is_packed, pack_values, packed_config, plain_config
from hf_chts.export.pushed_card import FIGURES
from hf_chts.export.sources import architecture, refuse_adapter
from hf_chts.export.weight_files import (
    FLOATS,
    PACKED_STEM,
    PLAIN_STEM,
    WeightFiles,
    read_json,
    write_shards,
)
from hf_chts.files.atomic import whole_directory
from hf_chts.files.reading import LazyMapping
from hf_chts.files.tensor_file import Planned, write_file
from hf_chts.layers.masked_linear import PLAIN_LAYERS, masked_class
from hf_chts.topology.bits import count_bits, pack_bits
from hf_chts.topology.patterns import Pattern

SHARD_SIZE = "50GB"  # as in save_pretrained

# what an export has apart from weights and config.json: tokenizer, generation and sparsity config, model card, own code
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.spm", "*.bpe", "*.tiktoken", "*.py", "README.md", "LICENSE*")
_NOT_COPIED = (
    *("*.index.json", "config.json", "trainer_state.json", "adapter_config.json"),
    *(HISTORY_NAME, SEAL_NAME, CHECKSUMS_NAME),
)


def pack_directory(
    source: str | Path,
    target: str | Path,
    *,
    max_shard_size: int | str = SHARD_SIZE,
    transposed: Collection[str] | None = None,
) -> Path:
    """Write a packed directory (packed_format.py) from a plain export.

    Args:
        source: what `export_sparse` wrote, or a checkpoint of SparseTrainer.
        target: a new or empty directory. It appears when it is complete.
        max_shard_size: in bytes, or as "5GB".
        transposed: names of the layers whose weight is stored as (in, out). None: taken from the model's class.

    Returns:
        `target`.

    Raises:
        FileNotFoundError: `source` lacks weights, masks or a config.
        FileExistsError: `target` is not empty.
        ValueError: `source` is dense, packed already or damaged, or has weights off its masks, NaN or infinity.
    """
    source = Path(source)
    if not (source / "config.json").is_file():
        refuse_adapter(source)
    config = read_json(source / "config.json")
    if "quantization_config" in config:
        state = "packed" if is_packed(config) else "quantized"
        raise ValueError(f"{source} is {state} already: pack a plain export of a sparse model")
    sparsity = SparsityConfig.load(source)
    if sparsity.is_dense:
        raise ValueError(f"{source} is a dense model, which cannot be packed: use it as it is")
    verify_checksums(source, PLAIN_STEM)
    masks, files = MaskFile(source), WeightFiles(source, PLAIN_STEM)
    layers = {f"{name}.weight": name for name in masks.shapes}
    for key, name in layers.items():
        if key not in files.entries:
            raise ValueError(
                f"{source} has a mask of {name} but no weight {key}, because this architecture stores weights under "
                "other names. Load it with load_sparse, and pack it with export_sparse(model, directory, packed=True)"
            )
    if transposed is None:
        transposed = _transposed_layers(source, config)

    def metadata(tensors: Sequence[Planned]) -> dict[str, str]:
        here = {tensor.key.removesuffix("_bits") for tensor in tensors}
        keys = (key for key, name in layers.items() if name in transposed and key in here)
        return packed_format.metadata(keys, sparsity.links_pattern)

    groups = [
        _packed(files, masks, key, layers[key], layers[key] in transposed, sparsity.links_pattern)
        if key in layers
        else [_copied(files, key, check_finite=True)]
        for key in files.entries
    ]
    with whole_directory(target) as new:
        write_shards(new, PACKED_STEM, groups, max_shard_size=max_shard_size, metadata=metadata, single=False)
        write_checksums(new, PACKED_STEM)
        copy_others(source, new, packed_config(config, sparsity.links_pattern), packed=True)
    return Path(target)


def unpack_directory(source: str | Path, target: str | Path, *, max_shard_size: int | str = SHARD_SIZE) -> Path:
    """Write the plain directory of a packed one: masks.safetensors, and every bit of the weights.

    Args:
        source: a packed directory.
        target: a new or empty directory. It appears when it is complete.
        max_shard_size: in bytes, or as "5GB".

    Returns:
        `target`.

    Raises:
        FileNotFoundError: `source` lacks weights or a config.
        FileExistsError: `target` is not empty.
        ValueError: `source` is not packed, or damaged.
    """
    source = Path(source)
    config = read_json(source / "config.json")
    if not is_packed(config):
        raise ValueError(f"{source} is not packed: its config.json has no quantization_config of hf_chts")
    refuse_plain(activations_of(source), "load_sparse to load it, or train on with it")
    packed = PackedFiles(source)
    packed.check_contents()
    weights = [
        Planned(key, weight.dtype, weight.shape, partial(packed.weight, key)) for key, weight in packed.weights.items()
    ]
    groups = [[one] for one in [*weights, *(_copied(packed.files, key) for key in packed.others)]]
    shapes, keys = {}, {}
    for key, weight in packed.weights.items():
        name = key.removesuffix(".weight")
        shapes[name] = weight.shape[::-1] if weight.transposed else weight.shape
        keys[f"{name}.mask"] = key
    masks = LazyMapping(lambda name: _mask_bits(packed, keys[name]), keys)
    mask_tensors = [
        Planned(name, "U8", ((math.prod(packed.weights[key].shape) + 7) // 8,), partial(masks.__getitem__, name))
        for name, key in keys.items()
    ]
    with whole_directory(target) as new:
        write_shards(
            new,
            PLAIN_STEM,
            groups,
            max_shard_size=max_shard_size,
            metadata=lambda tensors: {"format": "pt"},
            single=True,
        )
        write_checksums(new, PLAIN_STEM)
        write_file(new / MASKS_NAME, mask_tensors, mask_metadata(masks, shapes))
        copy_others(source, new, plain_config(config), packed=False)
    return Path(target)


def _packed(
    files: WeightFiles, masks: MaskFile, key: str, name: str, transposed: bool, pattern: Pattern | None
) -> list[Planned]:
    """The three packed tensors of a plain weight."""
    entry, shape = files.entries[key], masks.shapes[name]
    stored_shape = shape[::-1] if transposed else shape
    if entry.dtype not in FLOATS or entry.shape != stored_shape:
        raise ValueError(
            f"{entry.path}: {key} is {entry.dtype} {entry.shape}, and its mask is for floats {stored_shape}: weights "
            "and masks are of different models, restore both from one export"
        )

    def mask() -> Tensor:
        return masks.mask(name).t() if transposed else masks.mask(name)

    def values() -> Tensor:
        weight, links = files.read(key), mask()
        check_zeros(entry.path, name, weight, links)
        found = pack_values(weight, links)
        check_stored(entry.path, {key: found})
        return found

    links = count_bits(masks.tensors[f"{name}.mask"])
    header = packed_index.header((stored_shape[0], stored_shape[1]), links, pattern, transposed)
    return [
        Planned(
            f"{key}_bits",
            "U8",
            (packed_index.size(header, links),),
            lambda: packed_index.packed_index(mask(), header),
        ),
        Planned(f"{key}_values", entry.dtype, (links,), values),
        Planned(f"{key}_shape", "I64", (len(header),), lambda: torch.tensor(header)),
    ]


def _copied(files: WeightFiles, key: str, *, check_finite: bool = False) -> Planned:
    entry = files.entries[key]

    def tensor() -> Tensor:
        found = files.read(key)
        if check_finite:
            check_stored(entry.path, {key: found})
        return found

    return Planned(key, entry.dtype, entry.shape, tensor)


def _mask_bits(packed: PackedFiles, key: str) -> Tensor:
    """uint8: the bits of a mask (out, in), as masks.safetensors has them."""
    return pack_bits(packed.mask(key)) if packed.weights[key].transposed else packed.bits(key)


def _transposed_layers(source: Path, config: dict[str, Any]) -> set[str]:
    """The names of layers whose weight is stored as (in, out), from a model on the meta device."""
    try:
        with torch.device("meta"):
            model = empty_model(config, source)
    except Exception as error:
        raise ValueError(
            f"{source}: its config.json does not make a {architecture(config)}, which would show how weights are "
            f"stored: {error}. Load the model and use export_sparse(model, directory, packed=True)"
        ) from error
    return {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, PLAIN_LAYERS) and masked_class(layer).transposed
    }


def copy_others(source: Path, target: Path, config: dict[str, Any], *, packed: bool) -> None:
    """Copy everything but weights; with this config.json, and the model card's section on loading rewritten."""
    for path in sorted(source.iterdir()):
        if path.is_file() and any(map(path.match, _COPIED)) and not any(map(path.match, _NOT_COPIED)):
            shutil.copyfile(path, target / path.name)
    if (source / FIGURES).is_dir():
        shutil.copytree(source / FIGURES, target / FIGURES)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = target / "README.md"
    if card.is_file():
        text = with_loading(card.read_text(encoding="utf-8"), architecture(config), packed=packed)
        card.write_text(text, encoding="utf-8")

"""Which files of a directory belong to the model, and whether they are complete: these alone go to the Hub."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from hf_chts.checkpoint import MASKS_NAME, MaskFile
from hf_chts.config import CONFIG_NAME, SparsityConfig
from hf_chts.export.checksums import CHECKSUMS_NAME, verify_checksums
from hf_chts.export.exported_values import check_all_stored, check_zeros
from hf_chts.export.packed_files import PackedFiles
from hf_chts.export.packed_format import is_packed
from hf_chts.export.pushed_card import FIGURES
from hf_chts.export.sources import checked_config
from hf_chts.export.weight_files import PACKED_STEM, PLAIN_STEM, WeightFiles, find_shards, index_path
from hf_chts.export.zero_shot_results import RESULTS_NAME

CARD = "README.md"
PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".gif", ".webp")

# pushed with weights, masks, config and card: generation config, tokenizers, processors, licences. Nothing else is
# pushed, because checkpoints have pickles of the optimizer, and their owner may keep other files there
_OTHERS = (
    *("generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "normalizer.json"),
    *("vocab*.json", "vocab*.txt", "merges*.txt", "*.model", "*.spm", "*.bpe", "*.tiktoken", "*.jinja"),
    *("chat_template*.json", "*processor_config.json", "LICENSE*", "NOTICE*"),
)
_WEIGHTS = re.compile(rf"({PLAIN_STEM}|{PACKED_STEM})(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class ExportFiles:
    """The files of an export, or of a checkpoint of SparseTrainer.

    Attributes:
        directory: where they are.
        sparsity: its config; None if there is no sparsity_config.json, as in a checkpoint of a dense run.
        packed: whether the weights are packed.
        paths: path in a repository → local path.
    """

    directory: Path
    sparsity: SparsityConfig | None
    packed: bool
    paths: dict[str, Path]


def export_files(directory: str | Path) -> ExportFiles:
    """The files of an export that belong to the model. Their contents are not checked, see `check_contents`.

    Raises:
        FileNotFoundError: the directory does not exist, or lacks config.json, weights or masks.
        NotADirectoryError: it is a file.
        ValueError: a file is damaged.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file: name the directory of an export or a checkpoint")
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}: name an export or a checkpoint")
    config = checked_config(directory)
    sparsity = SparsityConfig.load(directory) if (directory / CONFIG_NAME).is_file() else None
    packed = is_packed(config)
    stem = PACKED_STEM if packed else PLAIN_STEM
    shards, places = find_shards(directory, stem)
    names = ["config.json", CONFIG_NAME, CARD, RESULTS_NAME, CHECKSUMS_NAME, *(shard.name for shard in shards)]
    if places is not None:
        names.append(index_path(directory, stem).name)
    if not packed and sparsity is not None and not sparsity.is_dense and not (directory / MASKS_NAME).is_file():
        raise FileNotFoundError(f"{directory / MASKS_NAME} is missing: {directory} is not complete, copy it again")
    names += [] if packed else [MASKS_NAME]
    paths = {name: directory / name for name in names if (directory / name).is_file()}
    for path in sorted(directory.iterdir()):
        if path.is_file() and (any(map(path.match, _OTHERS)) or ("auto_map" in config and path.suffix == ".py")):
            paths.setdefault(path.name, path)
    for path in sorted((directory / FIGURES).glob("[!.]*")):
        if path.is_file() and path.suffix.lower() in PICTURES:
            paths[f"{FIGURES}/{path.name}"] = path
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        paths[f"{path.parent.name}/{path.name}"] = path
    return ExportFiles(directory, sparsity, packed, paths)


def check_contents(export: ExportFiles) -> None:
    """Read weights and masks once, one tensor at a time.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a file is damaged, a weight is NaN or infinite, or weights and masks are of different models.
    """
    if export.packed:
        packed = PackedFiles(export.directory)
        packed.check_contents()
        check_all_stored(packed.files, packed.files.entries)
        return
    verify_checksums(export.directory, PLAIN_STEM)
    files = WeightFiles(export.directory, PLAIN_STEM)
    check_all_stored(files, files.entries)
    if MASKS_NAME not in export.paths:
        return
    masks = MaskFile(export.directory)
    for name in masks.shapes:
        if f"{name}.weight" in files.entries:  # a few architectures store weights under other names
            mask = masks.mask(name)
            # some weights are stored as (in, out): both layouts are tried, without the model's class
            check_zeros(export.directory, name, files.read(f"{name}.weight"), mask, mask.t())


def stale(remote: Iterable[str], pushed: Collection[str]) -> list[str]:
    """The files in a repository that belong to an earlier model and that this push does not replace.

    These are weights in another layout (packed or plain, another number of shards), masks, figures and results. Other
    files are their owner's, and stay.
    """
    return sorted(name for name in remote if name not in pushed and _is_ours(name))


def _is_ours(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if folder:
        return folder == FIGURES and file.lower().endswith(PICTURES)
    return bool(_WEIGHTS.fullmatch(name)) or name in (MASKS_NAME, RESULTS_NAME, CHECKSUMS_NAME)

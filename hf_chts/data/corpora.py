"""Documents from the embedded corpus, local files and folders, and the Hub."""

import json
import logging
import re
from dataclasses import asdict
from pathlib import Path

import datasets
from datasets.fingerprint import Hasher
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import HfApi, metadata_load
from yaml import YAMLError

from hf_chts.data.arguments import OnBadDocument
from hf_chts.data.bad_documents import DocumentFilter
from hf_chts.data.embedded import embedded_dataset
from hf_chts.data.formats import COMPRESSIONS, FORMATS, DataFile, format_of
from hf_chts.data.sources import DatasetSource, FileSource, Source
from hf_chts.files.atomic import write_json

logger = logging.getLogger(__name__)

# files that `datasets` writes beside the data
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
# text files that describe data of another format
_ABOUT_TEXT = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|authors|changelog|requirements)[^.]*\.te?xt", re.I
)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

# as datasets on the Hub name their files: train-00000-of-00080.parquet, c4-validation.00003-of-00008.json.gz
_NAMED_SPLIT = re.compile(r"(?:^|[-._])(train|validation|valid|val|dev|test)(?:[-._]\d+-of-\d+)\.")


def load_source(
    dataset: str,
    split: str = "train",
    *,
    config: str | None = None,
    text_column: str = "text",
    on_bad_document: OnBadDocument = "error",
    download: bool = False,
) -> Source:
    """The documents of one split.

    Local files, and Parquet and JSON on the Hub, are read by `DataFile`, which can go on anywhere in a file. Other
    formats on the Hub are read by `datasets`.

    Args:
        dataset: "embedded", a local file or folder, or a Hub id. A plain text file is one document.
        config: configuration of a Hub dataset, or of its clone; of another local folder, a sub-folder.
        text_column: the column that holds a document's text.
        on_bad_document: what to do with bad documents before the first good one, which is read here.
        download: copy files of the Hub first, and use the last copy if the Hub cannot be reached.

    Raises:
        FileNotFoundError: a local path does not exist, or a folder has no files to read.
        ValueError: there is no such split or column, or no readable document; files are of several formats or cannot
            be read; or a Hub dataset cannot be loaded.
    """
    path = Path(dataset).expanduser()
    source: Source
    if dataset == "embedded":
        source = DatasetSource(embedded_dataset(split), text_column)
    elif path.exists() or dataset.startswith((".", "/", "~")) or dataset.count("/") > 1 or format_of(path):
        source = FileSource(_local_files(path, split, config), text_column)
    else:
        source = _hub_source(dataset, config, split, text_column, download)
    accept = DocumentFilter(on_bad_document)
    if not any(accept(document) for shard in range(source.num_shards) for document, _ in source.read(shard)):
        reason = f", and {accept.skipped} that cannot be read; the first is {accept.first}" if accept.first else ""
        raise ValueError(f"Split {split!r} of dataset {dataset!r} holds no documents{reason}: use another.")
    return source


def _local_files(path: Path, split: str, config: str | None) -> list[DataFile]:
    files = find_files(path, split, config)
    examples = {format_of(file) or "": file.name for file in files}
    if len(examples) > 1:
        raise ValueError(
            f"{path} holds files of several formats ({', '.join(sorted(examples))}; such as "
            f"{', '.join(sorted(examples.values()))}): keep one of them, or set dataset to one file."
        )
    (form,) = examples
    for file in files:
        if file.stat().st_size < 1024 and file.read_bytes().startswith(_LFS_POINTER):
            raise ValueError(f"{file} is a pointer of Git LFS and not the file itself: run `git lfs pull` where it is.")
    return [_data_file(file, file.name if file == path else file.relative_to(path).as_posix(), form) for file in files]


def _data_file(file: Path, name: str, form: str) -> DataFile:
    status = file.stat()
    return DataFile(str(file.absolute()), name, status.st_size, form, status.st_mtime_ns)


def _hub_source(dataset: str, config: str | None, split: str, text_column: str, download: bool) -> Source:
    copied = Path(datasets.config.HF_DATASETS_CACHE) / f"hf_chts-{Hasher.hash([dataset, config, split])}.json"
    try:
        builder = datasets.load_dataset_builder(full_hub_id(dataset), config)
        paths = list((builder.config.data_files or {}).get(split, []))
        form = "parquet" if isinstance(builder, Parquet) else "json" if isinstance(builder, Json) else ""
        plain = form == "parquet" or (form == "json" and not builder.config.field)
        # "::" in a URL stands for an archive, which `datasets` opens
        if not paths or not plain or any("::" in path for path in paths):
            documents = datasets.load_dataset(full_hub_id(dataset), config, split=split, streaming=not download)
            return DatasetSource(documents, text_column)
        if not download:
            # a path on the Hub has the revision in it, which stands for the size
            return FileSource([DataFile(path, path, None, form) for path in paths], text_column)
        local = [Path(path) for path in datasets.DownloadManager().download(paths)]
    except Exception as error:
        message = (
            f"Split {split!r} of dataset {dataset!r} (dataset_config {config!r}) could not be loaded from "
            f"the Hub: {_reason(error)} Check the id, the configuration and the split's name, that the Hub "
            "can be reached, and for a gated dataset that you are logged in; or set dataset to a local file "
            "or folder, or to 'embedded'."
        )
        files = _copied_files(copied) if download else None
        if files is None:
            raise ValueError(message) from error
        logger.warning("%s Going on with the files that were downloaded before.", message)
        return FileSource(files, text_column)
    files = [_data_file(file, path, form) for file, path in zip(local, paths, strict=True)]
    write_json(copied, [asdict(file) for file in files])
    return FileSource(files, text_column)


def _copied_files(listing: Path) -> list[DataFile] | None:
    """The files that were downloaded before, if all of them still exist."""
    if not listing.is_file():
        return None
    files = [DataFile(**file) for file in json.loads(listing.read_text(encoding="utf-8"))]
    return files if all(Path(file.path).is_file() for file in files) else None


def find_files(path: Path, split: str, config: str | None = None) -> list[Path]:
    """The files of `split` under a local file or folder, sorted by path.

    The splits of a folder are, by the first of these rules that applies:

    1. what its README.md lists as `configs`, as on the Hub;
    2. what `DatasetDict.save_to_disk` wrote;
    3. files and sub-folders by their names, if one is called `train` (`train.jsonl`, `train/…`);
    4. files anywhere in it that are named as on the Hub, `train-00000-of-00080.parquet`;
    5. one split called "train", as for a single file.

    Left out are hidden files, files in a folder that end in something else than `FORMATS`, and files about the data:
    dataset_infos.json, caches of `save_to_disk`, a licence next to data that are not text.

    Args:
        config: one of README.md's `configs`; or only the sub-folder of that name, if there is one.

    Raises:
        FileNotFoundError: `path` does not exist, or has no file to read.
        ValueError: there is no such split, or the file has an unknown ending.
    """
    endings = f"{', '.join(FORMATS)}, each also with {', '.join(COMPRESSIONS)} after it"
    if not path.exists():
        raise FileNotFoundError(
            f"dataset {str(path)!r} does not exist: give a file or folder that does, the id of a Hub "
            "dataset, or 'embedded'."
        )
    if path.is_file():
        if format_of(path) is None:
            raise ValueError(f"{path} has an unknown ending: the known ones are {endings}.")
        if split != "train":
            raise ValueError(
                f"{path} is one file and so has one split, 'train', not {split!r}: put train.* and {split}.* "
                "into a folder and set dataset to the folder."
            )
        return [path]
    by_split = _splits_of_card(path, config)
    if by_split is None:
        if config and (path / config).is_dir():
            path = path / config
        by_split = _by_split(path, _data_files(path))
    if not any(by_split.values()):
        raise FileNotFoundError(f"Folder {path} holds no files to read: they end in {endings}.")
    if not by_split.get(split):
        raise ValueError(
            f"Folder {path} has no split {split!r}, only {', '.join(sorted(by_split))}: a split is a file or "
            "sub-folder of its name, next to one called train."
        )
    return by_split[split]


def _splits_of_card(path: Path, config: str | None) -> dict[str, list[Path]] | None:
    """The files of the splits that a README.md lists, as on the Hub; None if it lists none."""
    card = path / "README.md"
    try:
        configs = (metadata_load(card) or {}).get("configs") if card.is_file() else None
    except (ValueError, YAMLError) as error:
        raise ValueError(f"The head of {card} could not be read: {_reason(error)} Repair or remove it.") from error
    if not configs:
        return None
    try:
        found = datasets.load_dataset_builder(str(path), config).config.data_files or {}
    except Exception as error:
        raise ValueError(
            f"The splits that {card} names could not be found: {_reason(error)} Set dataset_config to one of its "
            "configurations, or remove the file to have folders and files named as splits taken for them."
        ) from error
    return {str(split): [Path(file) for file in files if format_of(Path(file))] for split, files in found.items()}


def _data_files(path: Path) -> list[Path]:
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and format_of(file)
        and file.name not in _ABOUT_DATA
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    for folder in {file.parent for file in files if file.name == "state.json"}:
        if (folder / "dataset_info.json").is_file():
            # `save_to_disk` lists its files; others in the folder are caches
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            listed = {folder / file["filename"] for file in state["_data_files"]}
            files = [file for file in files if file.parent != folder or file in listed]
    if len({format_of(file) for file in files}) > 1:
        files = [file for file in files if not (file.parent == path and _ABOUT_TEXT.fullmatch(file.name))]
    return files


def _by_split(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    top = [file.relative_to(path).parts[0].split(".")[0] for file in files]
    if (path / "dataset_dict.json").is_file():
        return {
            name: [file for file in files if file.relative_to(path).parts[0] == name]
            for name in json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        }
    named = [found.group(1) if (found := _NAMED_SPLIT.search(file.name)) else None for file in files]
    if "train" in top:
        splits = top
    elif "train" in named:
        splits = [name or "" for name in named]
        if "" in splits:
            raise ValueError(
                f"Some files in {path} have their split in their names and {files[splits.index('')]} does not: "
                "rename it, or put each split's files into a sub-folder of its name."
            )
    else:
        splits = ["train"] * len(files)
    by_split: dict[str, list[Path]] = {}
    for name, file in zip(splits, files, strict=True):
        by_split.setdefault(name, []).append(file)
    return by_split


def full_hub_id(dataset: str) -> str:
    """`Skylion007/openwebtext` for `openwebtext`: the Hub redirects such old names, `datasets` does not."""
    return dataset if "/" in dataset else HfApi().dataset_info(dataset).id


def _reason(error: BaseException) -> str:
    """The innermost message, which `datasets` wraps in 'An error occurred while generating the dataset'."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().rstrip('.')}."

"""Documents from the embedded corpus, local files and folders, and the Hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import HfApi

from hf_chts.data.embedded import embedded_dataset
from hf_chts.data.files import DataFile
from hf_chts.data.packing import Documents
from hf_chts.data.sources import DatasetSource, FileSource, Source, texts_of_source

# file ending → the builder of `datasets` that reads it
FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}

# as datasets on the Hub name their files: train-00000-of-00080.parquet, c4-validation.00003-of-00008.json.gz
_NAMED_SPLIT = re.compile(r"(?:^|[-._])(train|validation|valid|val|dev|test)(?:[-._]\d+-of-\d+)\.")


def load_documents(
    dataset: str,
    split: str = "train",
    *,
    config: str | None = None,
    text_column: str = "text",
    streaming: bool = False,
) -> Documents:
    """The documents of one split: a row each, the text in `text_column`.

    Args:
        dataset: "embedded", a local file or folder, or a Hub id. A plain text file is one document.
        config: configuration of a Hub dataset; of a local folder, a sub-folder.
        streaming: an `IterableDataset` that reads while it is iterated over, instead of a `Dataset`.

    Raises:
        FileNotFoundError: a local path that does not exist, or a folder without files to read.
        ValueError: no such split or column, a column that holds no text, files of several formats, no
            documents, files that cannot be read, or a Hub dataset that cannot be loaded.
    """
    path = Path(dataset).expanduser()
    if dataset == "embedded":
        embedded = embedded_dataset(split)
        documents = embedded.to_iterable_dataset() if streaming else embedded
    elif path.exists() or _looks_like_path(dataset):
        documents = _load_local(path, split, config, streaming)
    else:
        documents = _load_from_hub(dataset, config, split, streaming)
    _check_text_column(documents, dataset, split, text_column)
    return documents if streaming else documents.select_columns([text_column])


def load_source(dataset: str, split: str = "train", *, config: str | None = None, text_column: str = "text") -> Source:
    """The documents of one split, to be streamed; the arguments are those of `load_documents`.

    Parquet and JSON lines are read by `DataFile`, on the Hub too, which takes up any file where it was left. Other
    formats go through `datasets`.

    Raises:
        FileNotFoundError, ValueError: as `load_documents`.
    """
    path = Path(dataset).expanduser()
    source: Source
    if dataset == "embedded":
        source = DatasetSource(embedded_dataset(split), text_column)
    elif path.exists() or _looks_like_path(dataset):
        files, builder = _one_format(path, split, config)
        source = FileSource([_local_file(file, path, builder) for file in files], text_column)
    else:
        source = _hub_source(dataset, config, split, text_column)
    if next(texts_of_source(source), None) is None:
        raise ValueError(f"Split {split!r} of dataset {dataset!r} holds no documents: use another.")
    return source


def _local_file(file: Path, root: Path, builder: str) -> DataFile:
    status = file.stat()
    name = file.name if file == root else file.relative_to(root).as_posix()
    return DataFile(str(file.absolute()), name, status.st_size, builder, status.st_mtime_ns)


def _hub_source(dataset: str, config: str | None, split: str, text_column: str) -> Source:
    with _naming_hub_errors(dataset, config, split):
        builder = datasets.load_dataset_builder(full_hub_id(dataset), config)
        files = (builder.config.data_files or {}).get(split, [])
        kind = "parquet" if isinstance(builder, Parquet) else "json" if isinstance(builder, Json) else ""
        plain = kind == "parquet" or (kind == "json" and not builder.config.field)
        # archives and the like are chained in the URL
        if files and plain and not any("::" in file for file in files):
            # a path on the Hub has the revision in it, which stands for the size
            return FileSource([DataFile(file, file, None, kind) for file in files], text_column)
    return DatasetSource(_load_from_hub(dataset, config, split, streaming=True), text_column)


def local_files(path: Path, split: str, config: str | None = None) -> list[Path]:
    """The files of `split` under a local file or folder, sorted by path.

    A folder with a file or sub-folder called `train` (`train.jsonl`, `train/…`) is one of splits, each called
    as its file or sub-folder. So is one whose files are named as datasets on the Hub name them, wherever they lie:
    `train-00000-of-00080.parquet`, `c4-validation.00003-of-00008.json.gz`. Any other folder is one split, called
    "train", and so is a file. Hidden files, and files in a folder that end in something else than `FORMATS`, are left
    out.

    Args:
        config: only its sub-folder of that name, where the folder has one.

    Raises:
        FileNotFoundError: nothing is there, or nothing that can be read.
        ValueError: there is no such split, or the file has an unknown ending.
    """
    if config and (path / config).is_dir():
        path = path / config
    endings = f"{', '.join(FORMATS)}, each also with .gz after it"
    if not path.exists():
        raise FileNotFoundError(
            f"dataset {str(path)!r} does not exist: give a file or folder that does, the id of a Hub "
            "dataset, or 'embedded'."
        )
    if path.is_file():
        if _format_of(path) is None:
            raise ValueError(f"{path} has an unknown ending: the known ones are {endings}.")
        if split != "train":
            raise ValueError(
                f"{path} is one file and so has one split, 'train', not {split!r}: put train.* and {split}.* "
                "into a folder and set dataset to the folder."
            )
        return [path]
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and _format_of(file)
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise FileNotFoundError(f"Folder {path} holds no files to read: they end in {endings}.")
    by_split = _by_split(path, files)
    if split not in by_split:
        raise ValueError(
            f"Folder {path} has no split {split!r}, only {', '.join(sorted(by_split))}: a split is a file or "
            "sub-folder of its name, next to one called train."
        )
    return by_split[split]


def _by_split(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    top = [file.relative_to(path).parts[0].split(".")[0] for file in files]
    named = [found.group(1) if (found := _NAMED_SPLIT.search(file.name)) else None for file in files]
    if "train" in top:
        splits = top
    elif "train" in named:
        splits = [name or "" for name in named]
        if "" in splits:
            raise ValueError(
                f"The names of some files in {path} tell their split and that of {files[splits.index('')]} does not: "
                "rename it, or put each split's files into a sub-folder of its name."
            )
    else:
        splits = ["train"] * len(files)
    by_split: dict[str, list[Path]] = {}
    for name, file in zip(splits, files, strict=True):
        by_split.setdefault(name, []).append(file)
    return by_split


def _looks_like_path(dataset: str) -> bool:
    return dataset.startswith((".", "/", "~")) or dataset.count("/") > 1 or _format_of(Path(dataset)) is not None


def _format_of(path: Path) -> str | None:
    return FORMATS.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def _one_format(path: Path, split: str, config: str | None) -> tuple[list[Path], str]:
    files = local_files(path, split, config)
    builder, *others = sorted({_format_of(file) or "" for file in files})
    if others:
        raise ValueError(
            f"{path} holds files of several formats ({', '.join([builder, *others])}): keep one of them, or "
            "set dataset to one file."
        )
    return files, builder


def _load_local(path: Path, split: str, config: str | None, streaming: bool) -> Documents:
    files, builder = _one_format(path, split, config)
    # the text builder's default would make every line a document
    options = {"sample_by": "document"} if builder == "text" else {}
    try:
        return datasets.load_dataset(
            builder, data_files=[str(file) for file in files], split="train", streaming=streaming, **options
        )
    except Exception as error:
        raise ValueError(f"{path} could not be read as {builder}: {_reason(error)}") from error


def _load_from_hub(dataset: str, config: str | None, split: str, streaming: bool) -> Documents:
    with _naming_hub_errors(dataset, config, split):
        return datasets.load_dataset(full_hub_id(dataset), config, split=split, streaming=streaming)


@contextmanager
def _naming_hub_errors(dataset: str, config: str | None, split: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"Split {split!r} of dataset {dataset!r} (dataset_config {config!r}) could not be loaded from "
            f"the Hub: {_reason(error)} Check the id, the configuration and the split's name, that the Hub "
            "can be reached, and for a gated dataset that you are logged in; or set dataset to a local file "
            "or folder, or to 'embedded'."
        ) from error


def full_hub_id(dataset: str) -> str:
    """`Skylion007/openwebtext` for `openwebtext`: the Hub redirects such old names, datasets refuses them."""
    return dataset if "/" in dataset else HfApi().dataset_info(dataset).id


def _check_text_column(documents: Documents, dataset: str, split: str, text_column: str) -> None:
    # the first row, because a stream may not know its columns before it is read
    try:
        first = next(iter(documents), None)
    except Exception as error:
        raise ValueError(f"Split {split!r} of dataset {dataset!r} could not be read: {_reason(error)}") from error
    if first is None:
        raise ValueError(f"Split {split!r} of dataset {dataset!r} holds no documents: use another.")
    if text_column not in first:
        raise ValueError(
            f"Dataset {dataset!r} has no column {text_column!r}: set text_column to one of {', '.join(first)}."
        )
    if not isinstance(first[text_column], str | None):
        raise ValueError(
            f"Column {text_column!r} of dataset {dataset!r} holds {type(first[text_column]).__name__}, not "
            f"text: set text_column to another of {', '.join(first)}."
        )


def _reason(error: BaseException) -> str:
    """The innermost message: `datasets` wraps it in 'An error occurred while generating the dataset'."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().rstrip('.')}."

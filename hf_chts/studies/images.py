"""Images to classify: Fashion-MNIST, MNIST and EMNIST from files or the Hub, and scikit-learn's digits."""

import gzip
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_chts.config_checks import unknown

# where data of studies lie: folders of the names below
DATA_VARIABLE = "HF_CHTS_STUDY_DATA"


@dataclass(frozen=True)
class Source:
    """Where a data set is found.

    Attributes:
        hub: its id, and configuration if it has several, on the Hub.
        folders: where its IDX files may be, the first of them below the folder that `DATA_VARIABLE` names.
        mean, deviation: of all pixels of the training set, scaled to [0, 1].
        prefix: of the names of its IDX files.
    """

    hub: tuple[str, ...]
    folders: tuple[str, ...]
    mean: float
    deviation: float
    prefix: str = ""


SOURCES = {
    "fashion_mnist": Source(
        ("zalando-datasets/fashion_mnist",),
        ("fashion_mnist", "/usr/share/datasets/fashion-mnist"),  # Debian's dataset-fashion-mnist
        0.2860,
        0.3530,
    ),
    "mnist": Source(("ylecun/mnist",), ("mnist",), 0.1307, 0.3081),
    "emnist": Source(("tanganke/emnist_letters",), ("emnist",), 0.1722, 0.3309, "emnist-letters-"),
}


NAMES = ("digits", *SOURCES)
_ENDS = {"images": "idx3-ubyte", "labels": "idx1-ubyte"}  # of the names of IDX files


@dataclass(frozen=True)
class Images:
    """Images and their classes.

    Attributes:
        train, test: (samples, pixels) float32, normalized.
        train_labels, test_labels: (samples,) int64, from 0 on.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1


def load_images(name: str) -> Images:
    """A data set by name: digits, or one of `SOURCES`, from files if they are there, else from the Hub.

    Raises:
        ValueError: the name is not known.
        OSError: it is nowhere, and the message says where it was looked for; or a file is damaged or missing.
    """
    if name == "digits":
        return _digits()
    if name not in SOURCES:
        raise ValueError(unknown("data", name, NAMES))
    source = SOURCES[name]
    given = os.environ.get(DATA_VARIABLE)
    first, *others = source.folders
    folders = [*([Path(given) / first] if given else []), *map(Path, others)]
    wanted = [(split, kind) for split in ("train", "test") for kind in ("images", "labels")]
    found = next((folder for folder in folders if any(_idx(folder, source.prefix, *part) for part in wanted)), None)
    if found is not None:
        parts = [_read_part(found, source.prefix, *part) for part in wanted]
        pixels = [parts[number][0].size for number in (0, 2)]
        if pixels[0] != pixels[1]:
            raise OSError(f"{found} has images of {pixels[0]} and of {pixels[1]} pixels: fetch them again")
        for number, split in ((0, "train"), (2, "test")):
            if len(parts[number]) != len(parts[number + 1]):
                counts = f"{len(parts[number])} images and {len(parts[number + 1])} labels"
                raise OSError(f"{found} has {counts} of the {split} split: fetch them again")
    else:
        parts = _from_hub(name, source, folders)
    images, labels, test, test_labels = parts
    low = int(labels.min())  # EMNIST's letters count from 1
    return Images(
        _normalized(images, source),
        torch.from_numpy(labels.astype(np.int64) - low),
        _normalized(test, source),
        torch.from_numpy(test_labels.astype(np.int64) - low),
    )


def _idx(folder: Path, prefix: str, split: str, kind: str) -> Path | None:
    """The file of one part of a data set in MNIST's form, packed or not."""
    names = ["train"] if split == "train" else ["t10k", "test"]
    files = (folder / f"{prefix}{name}-{kind}-{_ENDS[kind]}{end}" for name in names for end in (".gz", ""))
    return next((file for file in files if file.is_file()), None)


def _read_part(folder: Path, prefix: str, split: str, kind: str) -> np.ndarray:
    path = _idx(folder, prefix, split, kind)
    if path is None:
        name = f"{prefix}{'train' if split == 'train' else 't10k'}-{kind}-{_ENDS[kind]}"
        raise OSError(f"{folder} lacks the {kind} of the {split} split: fetch {name}, too")
    return _read_idx(path, dimensions=3 if kind == "images" else 1)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    data = path.read_bytes()
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        shape = np.frombuffer(data, ">i4", dimensions, offset=4)
        if data[:4] != bytes((0, 0, 8, dimensions)) or shape.min() < 1:
            raise ValueError(f"it begins with {data[:4]!r} and the shape {shape.tolist()}")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (ValueError, IndexError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise OSError(f"{path} is not a whole IDX file of bytes ({error}): fetch it again") from error


def _from_hub(name: str, source: Source, looked: Sequence[Path]) -> list[np.ndarray]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(*source.hub)
    except Exception as error:  # its kinds differ by version
        places = f" is not in {', '.join(map(str, looked))}, and" if looked else ":"
        raise OSError(
            f"{name}{places} {source.hub[0]} could not be loaded from the Hub ({error}): put its IDX "
            f"files into a folder {source.folders[0]} and name the folder around it in {DATA_VARIABLE}"
        ) from error
    return [
        np.stack([np.asarray(image) for image in loaded[split]["image"]])
        if kind == "image"
        else np.asarray(loaded[split][kind])
        for split in ("train", "test")
        for kind in ("image", "label")
    ]


def _normalized(images: np.ndarray, source: Source) -> Tensor:
    pixels = torch.from_numpy(images.copy()).flatten(1).float().div_(255)
    return pixels.sub_(source.mean).div_(source.deviation)


def _digits() -> Images:
    """scikit-learn's 1,797 images of 8×8 pixels; every fifth is for the test."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float() / 16, torch.from_numpy(classes).long()
    x = (x - x.mean()) / x.std()
    test = torch.arange(len(x)) % 5 == 4
    return Images(x[~test], y[~test], x[test], y[test])

"""The safetensors shards of a directory: find, check, read and write them, with one tensor in memory at a time.

A shard is only opened under a name made here, `<stem>-00001-of-00003.safetensors`: a hostile index can choose among
these names, and lead nowhere else. safetensors checks each header against the file's size before it allocates memory.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import convert_file_size_to_int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_chts.files import reading as files_reading
from hf_chts.files.atomic import write_whole
from hf_chts.files.tensor_file import ITEM_BYTES, Planned, write_file

PLAIN_STEM = "model"
PACKED_STEM = "packed"

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


class DamagedFile(ValueError):
    """A file that is damaged or does not fit the others; the message names it and the remedy."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(f"{path} cannot be used: {reason}. Copy or download it again, or export the model again")


@dataclass(frozen=True)
class Entry:
    """A tensor as the header of its shard describes it; `dtype` is safetensors' name."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


class WeightFiles:
    """The tensors of all shards of a directory, by key. Opening reads the headers, and `read` one tensor.

    Args:
        directory: a local one.
        stem: PLAIN_STEM or PACKED_STEM, with which the names of the shards begin.

    Raises:
        FileNotFoundError: there are no weights with this stem, or a shard is missing.
        DamagedFile: the index or a shard is damaged, or they contradict each other.
    """

    def __init__(self, directory: Path, stem: str) -> None:
        self.directory = directory
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[Path, dict[str, str]] = {}
        self._files: dict[Path, Any] = {}
        paths, places = find_shards(directory, stem)
        for path in paths:
            self._open(path)
        if places is not None:
            self._check_places(index_path(directory, stem), places)

    def read(self, key: str) -> Tensor:
        """The tensor of a key, on the CPU."""
        return self._files[self.entries[key].path].get_tensor(key)

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: copy or download the directory again")
        try:
            file = safe_open(str(path), framework="pt")
            self.metadata[path] = dict(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118 - safe_open is not iterable
                if key in self.entries:
                    raise DamagedFile(path, f"it has {key}, and so does {self.entries[key].path.name}")
                part = file.get_slice(key)
                self.entries[key] = Entry(path, part.get_dtype(), tuple(part.get_shape()))
                if self.entries[key].dtype not in ITEM_BYTES:
                    raise DamagedFile(path, f"{key} has the unknown dtype {self.entries[key].dtype}")
        except (SafetensorError, OSError) as error:
            raise DamagedFile(path, error) from error
        self._files[path] = file

    def _check_places(self, index: Path, places: dict[str, str]) -> None:
        found = {key: entry.path.name for key, entry in self.entries.items()}
        if found != places:
            key = sorted(set(found.items()) ^ set(places.items()))[0][0]
            raise DamagedFile(
                index, f"it has {key} in {places.get(key, 'no shard')}, but that is in {found.get(key, 'no shard')}"
            )


def index_path(directory: Path, stem: str) -> Path:
    return directory / f"{stem}.safetensors.index.json"


def shard_name(stem: str, number: int, of: int) -> str:
    return f"{stem}-{number:05d}-of-{of:05d}.safetensors"


def find_shards(directory: Path, stem: str) -> tuple[list[Path], dict[str, str] | None]:
    """The paths of the shards, and the index's shard name by key; None for a single file, which has no index.

    Raises:
        FileNotFoundError: there is neither an index nor a single file.
        DamagedFile: the index is damaged, or names files that cannot be its shards.
    """
    single, index = directory / f"{stem}.safetensors", index_path(directory, stem)
    if single.is_file():
        return [single], None
    if not index.is_file():
        raise FileNotFoundError(
            f"{directory} has neither {single.name} nor {index.name}: name the directory of an exported model"
        )
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise DamagedFile(index, "it has no weight_map of names")
    names = sorted(set(places.values()))
    expected = [shard_name(stem, number + 1, len(names)) for number in range(len(names))]
    if names != expected:
        wrong = next(name for name in [*names, *expected] if (name in names) != (name in expected))
        raise DamagedFile(
            index, f"its {len(names)} shards must be named {expected[0]} to {expected[-1]}, and {wrong!r} differs"
        )
    return [directory / name for name in expected], places


def unlisted_shards(directory: Path, stem: str) -> list[str]:
    """Names of files that look like shards with this stem, but are not in its index."""
    known = {path.name for path in find_shards(directory, stem)[0]}
    return sorted(name for name in _weight_names(directory, stem) if name not in known and not name.endswith(".json"))


def remove_weights(directory: Path, stem: str) -> None:
    """Delete the weights and the index of an earlier export with this stem."""
    for name in _weight_names(directory, stem):
        (directory / name).unlink()


def _weight_names(directory: Path, stem: str) -> list[str]:
    name = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
    return [path.name for path in directory.iterdir() if name.fullmatch(path.name)]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of an export. Raises FileNotFoundError, or DamagedFile if it holds something else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {path.parent} is not an export, or was not copied completely")
    try:
        return files_reading.read_json(path)
    except ValueError as error:
        raise DamagedFile(path, error) from error


def write_shards(
    directory: Path,
    stem: str,
    groups: Iterable[Sequence[Planned]],
    *,
    max_shard_size: int | str,
    metadata: Callable[[Sequence[Planned]], dict[str, str]],
    single: bool,
) -> None:
    """Write tensors as shards and an index, with one tensor in memory at a time.

    Args:
        groups: tensors that are kept in one shard.
        max_shard_size: in bytes, or as "5GB". A larger group gets a shard of its own, as in `save_pretrained`.
        metadata: gives the metadata of a shard with these tensors.
        single: whether a single shard is called `<stem>.safetensors` and has no index.
    """
    limit = convert_file_size_to_int(max_shard_size)
    shards: list[list[Planned]] = [[]]
    for group in groups:
        if shards[-1] and sum(tensor.bytes for tensor in [*shards[-1], *group]) > limit:
            shards.append([])
        shards[-1] += group
    if single and len(shards) == 1:
        write_file(directory / f"{stem}.safetensors", shards[0], metadata(shards[0]))
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards):
        name = shard_name(stem, number + 1, len(shards))
        write_file(directory / name, shard, metadata(shard))
        places |= {tensor.key: name for tensor in shard}
    total = sum(tensor.bytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_whole(index_path(directory, stem), json.dumps(index, indent=2) + "\n")

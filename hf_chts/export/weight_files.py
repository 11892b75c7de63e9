"""The safetensors shards of a directory: found, checked, read and written one tensor at a time.

A shard is only ever opened under a name made here, `<stem>-00001-of-00003.safetensors`: an index may choose among those
names and say nothing else. safetensors checks each header against the size of its file before anything is allocated.
"""

import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from safetensors import SafetensorError, safe_open
from torch import Tensor

PLAIN_STEM = "model"
PACKED_STEM = "packed"

# safetensors' names of the types that are copied, with their bytes
ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1, "C64": 8},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1},
}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


class DamagedFile(ValueError):
    """A file that cannot be used; the message names it and says what to do."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(f"{path} cannot be used: {reason}. Copy or download it again, or export the model anew")


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard, by its header: safetensors' name of its type, and its shape."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


class WeightFiles:
    """The tensors of all shards of a directory, by key. Making one reads headers, `read` one tensor.

    Args:
        directory: local.
        stem: what the names of the shards begin with.

    Raises:
        FileNotFoundError: there are no weights of this stem, or a shard is missing.
        DamagedFile: an index or shard is damaged, or they do not fit each other.
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
            raise FileNotFoundError(f"{path} is missing: copy or download the whole directory again")
        try:
            file = safe_open(str(path), framework="pt")
            self.metadata[path] = dict(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118 - safe_open is not iterable
                if key in self.entries:
                    raise DamagedFile(path, f"it has {key}, and so has {self.entries[key].path.name}")
                part = file.get_slice(key)
                self.entries[key] = Entry(path, part.get_dtype(), tuple(part.get_shape()))
                if self.entries[key].dtype not in ITEM_BYTES:
                    raise DamagedFile(path, f"{key} is of the unknown type {self.entries[key].dtype}")
        except (SafetensorError, OSError) as error:
            raise DamagedFile(path, error) from error
        self._files[path] = file

    def _check_places(self, index: Path, places: dict[str, str]) -> None:
        found = {key: entry.path.name for key, entry in self.entries.items()}
        if found != places:
            key = sorted(set(found.items()) ^ set(places.items()))[0][0]
            raise DamagedFile(
                index,
                f"it has {key} in {places.get(key, 'no shard')}, and it is in {found.get(key, 'no shard')}",
            )


def index_path(directory: Path, stem: str) -> Path:
    return directory / f"{stem}.safetensors.index.json"


def shard_name(stem: str, number: int, of: int) -> str:
    return f"{stem}-{number:05d}-of-{of:05d}.safetensors"


def find_shards(directory: Path, stem: str) -> tuple[list[Path], dict[str, str] | None]:
    """The paths of the shards, and by key the name of the shard that the index has it in; None without an index.

    Raises:
        FileNotFoundError: there is neither an index nor a single file.
        DamagedFile: the index is damaged, or names files that are no shards of it.
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
            index, f"{len(names)} shards are named {expected[0]} to {expected[-1]}, and it disagrees about {wrong!r}"
        )
    return [directory / name for name in expected], places


def strays(directory: Path, stem: str) -> list[str]:
    """Names of files that look like shards of this stem and that its index does not have."""
    known = {path.name for path in find_shards(directory, stem)[0]}
    return sorted(name for name in _weight_names(directory, stem) if name not in known and not name.endswith(".json"))


def remove_weights(directory: Path, stem: str) -> None:
    """Delete the weights and the index of an earlier export of this stem."""
    for name in _weight_names(directory, stem):
        (directory / name).unlink()


def _weight_names(directory: Path, stem: str) -> list[str]:
    name = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
    return [path.name for path in directory.iterdir() if name.fullmatch(path.name)]


def read_json(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, or DamagedFile if it is not a JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {path.parent} is not an exported model, or was not copied whole")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(path, error) from error
    if not isinstance(content, dict):
        raise DamagedFile(path, f"it holds a {type(content).__name__}, not an object")
    return content


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its size is known, its contents are made by `make` when they are written."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * ITEM_BYTES[self.dtype]


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
        groups: tensors that stay in one shard.
        max_shard_size: bytes, or "5GB"; as in `save_pretrained`, one group that is larger gets a shard of its own.
        metadata: of a shard with these tensors.
        single: name a single shard `<stem>.safetensors`, without an index.
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
    index_path(directory, stem).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Sequence[Planned], metadata: dict[str, str]) -> None:
    """Write one safetensors file, tensor by tensor, under another name until it is whole.

    Raises:
        ValueError: a tensor is not of the size that was planned.
    """
    # wide types first, as safetensors itself does, so that each tensor lies at a multiple of its type's bytes
    tensors = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.bytes
        header[tensor.key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors:
                contents = tensor.make().contiguous().reshape(-1).view(torch.uint8)
                if contents.numel() != tensor.bytes:
                    raise ValueError(f"{tensor.key} has {contents.numel()} bytes, and {tensor.bytes} were planned")
                file.write(contents.numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # on a full disk it would be in the way
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # which errors of a write lack
        raise

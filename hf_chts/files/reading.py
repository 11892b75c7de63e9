"""Reading files that may be damaged: checksums, JSON, and errors that name the file and the remedy."""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_CHUNK = 1 << 20  # bytes


def crc32(path: str | Path) -> int:
    """The CRC-32 of a file of any size. It detects damage, not forgery."""
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def directory_size(directory: str | Path) -> int:
    """The bytes of all files in a directory and its subdirectories."""
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


def read_json(path: str | Path, format: str | None = None) -> dict[str, Any]:
    """The JSON object in a file; if `format` is given, the object must have it as its "format".

    Raises:
        ValueError: the file holds something else. The message lacks the file's name, which `reading` adds.
        OSError: the file cannot be read.
    """
    try:
        contents = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(contents, dict):
        raise ValueError(f"it holds a {type(contents).__name__}, not a JSON object")
    if format is not None and contents.get("format") != format:
        raise ValueError(f"its format is {contents.get('format')!r}, and this version of hf_chts reads {format!r}")
    return contents


@contextmanager
def reading(path: str | Path, remedy: str) -> Iterator[None]:
    """Turn errors that damaged contents raise in the block into a ValueError that names the file and the remedy."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} cannot be used: {reason}. {remedy}") from error


class LazyMapping(Mapping[str, T]):
    """A mapping that reads or computes a value on each access, so that only one is in memory at a time.

    Args:
        read: returns the value of a key.
        keys: in their order.
    """

    def __init__(self, read: Callable[[str], T], keys: Iterable[str]) -> None:
        self._read, self._keys = read, dict.fromkeys(keys)

    def __getitem__(self, key: str) -> T:
        if key not in self._keys:
            raise KeyError(key)
        return self._read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

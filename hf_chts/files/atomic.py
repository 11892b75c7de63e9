"""Writing files and directories whole or not at all, so that no reader and no crash ever sees half of one."""

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write into. It replaces `path` when the block ends, and is removed if the block raises.

    Until then it lies beside `path` under a hidden name. Its bytes are on the disk before it takes its place. Missing
    parent directories are made. An OSError that names no file, as those of a write do, gets the name of `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # a full disk needs the space back
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def write_whole(path: str | Path, data: bytes | str) -> None:
    """Write `data` to `path` as `whole_file` does; text is encoded as UTF-8."""
    with whole_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: str | Path, contents: Any, *, indent: int = 1) -> None:
    """Write `contents` as JSON to `path`, as `whole_file` does."""
    write_whole(path, json.dumps(contents, indent=indent))


def finite_or_null(contents: Any) -> Any:
    """What JSON can hold of nested `contents`: NaN and infinity, for which it has no word, become None."""
    if isinstance(contents, Mapping):
        return {name: finite_or_null(value) for name, value in contents.items()}
    if isinstance(contents, list | tuple):
        return [finite_or_null(value) for value in contents]
    return None if isinstance(contents, float) and not math.isfinite(contents) else contents


@contextmanager
def whole_directory(target: str | Path) -> Iterator[Path]:
    """A new directory to write into. It becomes `target` when the block ends, and is removed if the block raises.

    Raises:
        FileExistsError: `target` exists and is not an empty directory.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} already exists and is not an empty directory: choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        new = Path(temporary) / "new"  # not the temporary directory itself, which only its owner may read
        new.mkdir()
        yield new
        if target.exists():
            target.rmdir()
        os.replace(new, target)

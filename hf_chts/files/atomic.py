"""Atomic writes of files and directories: neither a reader nor a crash ever leaves half of one."""

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
    """A temporary file to write into, which replaces `path` when the block ends. If the block raises, it is removed.

    It is a hidden file beside `path`, and is flushed to the disk before it replaces `path`. Missing parent directories
    are made. OSErrors of writes, which name no file, get the name of `path`.
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


def write_json(path: str | Path, contents: Any) -> None:
    """Write `contents` as JSON to `path`, as `whole_file` does."""
    write_whole(path, json.dumps(contents, indent=1))


def finite_or_null(contents: Any) -> Any:
    """Nested `contents` with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(contents, Mapping):
        return {name: finite_or_null(value) for name, value in contents.items()}
    if isinstance(contents, list | tuple):
        return [finite_or_null(value) for value in contents]
    return None if isinstance(contents, float) and not math.isfinite(contents) else contents


@contextmanager
def whole_directory(target: str | Path) -> Iterator[Path]:
    """A temporary directory to write into, which becomes `target` when the block ends. If it raises, it is removed.

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

"""Explains failed writes, for example on a full disk: where, how much space is free, and how much is missing.

Python's own errors of a write name no file, and safetensors and torch.save raise errors of other types.
"""

import errno
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from hf_chts.files.reading import directory_size

# the messages of torch's archive writer for any failed write
_TORCH = re.compile(r"inline_container|PytorchStreamWriter|unexpected pos|iostream error|No space left", re.IGNORECASE)
_SYSTEM = re.compile(r"\(os error (\d+)\)")  # in messages of safetensors
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def explain_failed_write(
    directory: str | Path, then: str | Callable[[], str] = "", *, needs: Callable[[], int] = lambda: 0
) -> Iterator[None]:
    """If a write into `directory` fails in the block, raise an OSError that says where, why and what to do.

    Args:
        then: a sentence with the consequence and the remedy, or a function that returns it.
        needs: returns the size of the complete directory in bytes; 0 if it is not known.
    """
    try:
        yield
    except BaseException as error:  # torch.distributed.checkpoint raises a BaseException
        if not _is_failed_write(error):
            raise
        number = _number(error, Path(directory))
        reason = " ".join(str(error).split()) or type(error).__name__
        space = _space(Path(directory), number, needs())
        after = then if isinstance(then, str) else then()
        raise OSError(number, f"{directory} could not be written: {reason}{space}. {after}") from error


def _is_failed_write(error: BaseException) -> bool:
    if isinstance(error, OSError | SafetensorError):
        return True
    of_torch = isinstance(error, RuntimeError) or type(error).__name__ == "CheckpointException"
    return of_torch and bool(_TORCH.search(str(error)))


def _number(error: BaseException, directory: Path) -> int:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if found := _SYSTEM.search(str(error)):
        return int(found[1])
    return errno.ENOSPC if (free := _free(directory)) is not None and free < 1 << 20 else errno.EIO


def _space(directory: Path, number: int, needs: int) -> str:
    """The last file, the free space and the missing space; "" if the error is not about a full disk."""
    if number not in _FULL:
        return ""
    written = _last_written(directory)
    said = f", with {written.name} as the last file" if written else ""
    if (free := _free(directory)) is None:
        return said
    said += f". {_readable(free)} are free there"
    if needs and (missing := needs - directory_size(directory) - free) > 0:
        said += f", and about {_readable(missing)} more are needed: the whole takes about {_readable(needs)}"
    return said


def _free(directory: Path) -> int | None:
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return None


def _last_written(directory: Path) -> Path | None:
    files = [path for path in directory.rglob("*") if path.is_file()] if directory.is_dir() else []
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=None)


def _readable(number: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number} bytes"

"""The files of a corpus, read from any document on: Parquet, JSON lines and plain text, local or remote.

A position in a file is a whole number, and counts what the format can jump to: rows of a Parquet file (row groups
before it are not read), bytes of uncompressed JSON lines, lines of compressed ones (decompressed from the file's
beginning), 0 or 1 for a text file, which is one document.
"""

import bisect
import json
import lzma
import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import IO, Any, TypeAlias

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import infer_compression

# a document's text, None where the row has none, and the position after it
Row: TypeAlias = tuple[str | None, int]

_BATCH_ROWS = 256
# of a remote file that cannot be read, and the seconds before the second, doubled each time
_ATTEMPTS, _WAIT = 6, 1.0
# what a damaged file makes its reader raise
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, ValueError)


@dataclass(frozen=True)
class DataFile:
    """One file.

    Attributes:
        path: a local path or a URL that fsspec opens.
        name: what a checkpoint knows it by: relative to the corpus's folder.
        size: bytes; None where it is not known, and a remote path then names its revision.
        format: "parquet", "json" or "text".
        changed: when a local file was last written, in nanoseconds.
    """

    path: str
    name: str
    size: int | None
    format: str
    changed: int = 0

    @property
    def remote(self) -> bool:
        return "://" in self.path

    def read(self, text_column: str, part: int = 0, parts: int = 1, start: int | None = None) -> Iterator[Row]:
        """The documents of part `part` of `parts`, each in exactly one of them, from position `start` on.

        Raises:
            FileNotFoundError: the file is not there any more.
            ValueError: it is damaged, cannot be reached after several attempts, or holds no column `text_column` of
                text; the message names it.
        """
        after, failures = start, 0
        while True:
            try:
                for text, position in _READERS[self.format](self, text_column, part, parts, after):
                    if not isinstance(text, str | None):
                        raise TypeError(f"column {text_column!r} holds {type(text).__name__}, not text")
                    yield text, position
                    after, failures = position, 0
                return
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{self.path} is not there any more: put it back as it was, or start a run without it"
                ) from error
            except KeyError as error:
                raise ValueError(
                    f"{self.path} has no column {text_column!r} {self._where(after)}: remove the file, or set "
                    f"text_column to one that all files have. It has {error.args[0]}"
                ) from error
            except TypeError as error:
                raise ValueError(
                    f"{self.path}: {error} {self._where(after)}: remove the file, or set text_column to another"
                ) from error
            except Exception as error:
                failures += 1
                if not self.remote and not isinstance(error, _DAMAGE):
                    raise
                if self.remote and failures < _ATTEMPTS:
                    # the network; a file that is damaged fails again
                    time.sleep(_WAIT * 2**failures)
                    continue
                raise ValueError(
                    f"{self.path} could not be read {self._where(after)} ({type(error).__name__}: {error}): it "
                    + (
                        f"failed {failures} times; resume from the last checkpoint when it can be reached"
                        if self.remote
                        else "is damaged or was not copied whole; get it anew, or remove it and start a new run"
                    )
                ) from error

    def _where(self, after: int | None) -> str:
        unit = "byte" if self.format == "json" and infer_compression(self.path) is None else "row"
        return f"after {unit} {after}" if after else "at its beginning"

    def open(self, decompress: bool = True) -> AbstractContextManager[IO[bytes]]:
        compression = infer_compression(self.path) if decompress else None
        return fsspec.open(self.path, "rb", compression=compression)


def _parquet(file: DataFile, column: str, part: int, parts: int, start: int | None) -> Iterator[tuple[Any, int]]:
    # a remote column chunk in one request instead of a page at a time
    with (
        file.open(decompress=False) as opened,
        pq.ParquetFile(opened, pre_buffer=file.remote, page_checksum_verification=True) as parquet,
    ):
        names = parquet.schema_arrow.names
        if column not in names:
            raise KeyError(", ".join(names))
        groups = [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
        bounds = [0, *accumulate(groups)]
        if len(groups) >= parts:
            first, last = (bounds[len(groups) * i // parts] for i in (part, part + 1))
        else:
            first, last = (bounds[-1] * i // parts for i in (part, part + 1))
        first = max(first, start or 0)
        if first >= last:
            return
        group = bisect.bisect_right(bounds, first) - 1
        position = bounds[group]
        wanted = list(range(group, bisect.bisect_left(bounds, last)))
        for batch in parquet.iter_batches(_BATCH_ROWS, wanted, columns=[column], use_threads=False):
            begin, end = max(first - position, 0), min(last - position, batch.num_rows)
            if begin < end:
                for row, text in enumerate(batch.column(0).slice(begin, end - begin).to_pylist(), position + begin):
                    yield text, row + 1
            position += batch.num_rows


def _json(file: DataFile, column: str, part: int, parts: int, start: int | None) -> Iterator[tuple[Any, int]]:
    with file.open() as opened:
        if _is_array(opened):
            rows = json.load(opened)
            for index in range(max(len(rows) * part // parts, start or 0), len(rows) * (part + 1) // parts):
                yield _text_of(rows[index], column), index + 1
        elif infer_compression(file.path) is None:
            yield from _lines(opened, column, part, parts, start)
        else:
            # nobody can jump into it: the parts take turns, and parse only their own lines
            for index, line in enumerate(opened):
                if index % parts == part and index >= (start or 0) and not line.isspace():
                    yield _text_of(json.loads(line), column), index + 1


def _is_array(opened: IO[bytes]) -> bool:
    """Whether the first character is [; the file is at its beginning afterwards."""
    first = b" "
    while first.isspace():
        first = opened.read(1)
    opened.seek(0)
    return first == b"["


def _lines(opened: IO[bytes], column: str, part: int, parts: int, start: int | None) -> Iterator[tuple[Any, int]]:
    size = opened.seek(0, 2)
    # a line is in the part that its first byte is in
    position, last = size * part // parts, size * (part + 1) // parts
    if start is not None:
        position = start
        opened.seek(position)
    elif position:
        opened.seek(position - 1)
        position += len(opened.readline()) - 1
    else:
        opened.seek(0)
    while position < last:
        line = opened.readline()
        position += len(line)
        if not line.isspace():
            yield _text_of(json.loads(line), column), position


def _text_of(row: Any, column: str) -> Any:
    if not isinstance(row, dict):
        raise TypeError(f"a row is {type(row).__name__}, not an object with a column {column!r}")
    if column not in row:
        raise KeyError(", ".join(row))
    return row[column]


def _text(file: DataFile, column: str, part: int, parts: int, start: int | None) -> Iterator[tuple[Any, int]]:
    if part == 0 and not start:
        with file.open() as opened:
            # with the line ends of a file opened as text
            yield opened.read().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n"), 1


_READERS = {"parquet": _parquet, "json": _json, "text": _text}

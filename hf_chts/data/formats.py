"""The formats of a corpus's files, each read from any document on, local or remote.

A position in a file is an integer that counts what the format can jump to: rows of a Parquet file (row groups before it
are not read), bytes of uncompressed JSON lines, rows of a JSON array; 0 or 1 for a text file, which is one document. It
is impossible to jump into other formats: a position counts the lines of compressed JSON lines, the rows of CSV, TSV and
Arrow files and the samples of a tar, and what comes before it is read again.
"""

import bisect
import csv
import io
import json
import lzma
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from pathlib import PurePath
from typing import IO, Any, TypeAlias

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from hf_chts.data.bad_documents import BadDocument, ReadDocument, Unreadable, text_or_reason

# a document and the position after it
Row: TypeAlias = tuple[ReadDocument, int]
# what the reader of a format finds: a value that should be text, its place in words, and the position after it
Found: TypeAlias = tuple[Any, str, int]

# file ending → format
FORMATS = {
    **{".txt": "text", ".text": "text", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"},
    **{".csv": "csv", ".tsv": "tsv", ".arrow": "arrow", ".tar": "tar"},
}
# file ending → fsspec's name of the compression
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}

_BATCH_ROWS = 256
_BUFFER = 2**17
# for a remote file that cannot be read; the seconds of waiting double each time
_ATTEMPTS, _WAIT = 6, 1.0
# what readers raise for a damaged file
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, tarfile.TarError, csv.Error, ValueError)


def format_of(path: PurePath) -> str | None:
    """The format that a file's name says, compressed or not; None for an unknown ending."""
    name = PurePath(path.name.lower())
    return FORMATS.get((name.with_suffix("") if name.suffix in COMPRESSIONS else name).suffix)


@dataclass(frozen=True)
class DataFile:
    """One file.

    Attributes:
        path: a local path or a URL that fsspec opens.
        name: identifies it in a checkpoint: relative to the corpus's folder, with the ending of its compression.
        size: in bytes; None for a file on the Hub, whose path has the revision in it.
        format: one of `FORMATS`.
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

    @property
    def compression(self) -> str | None:
        return COMPRESSIONS.get(PurePath(self.name.lower()).suffix)

    def read(self, text_column: str, part: int = 0, parts: int = 1, start: int | None = None) -> Iterator[Row]:
        """The documents of part `part` of `parts` from position `start` on; each document is in one of the parts.

        A `BadDocument` stands for one that cannot be trained on; those after it are read.

        Raises:
            FileNotFoundError: the file is gone.
            ValueError: it is damaged, could not be reached in several attempts, or has no column `text_column`; the
                message names it.
        """
        after, failures, where = start, 0, ""
        while True:
            try:
                for value, place, position in _READERS[self.format](self, text_column, part, parts, after):
                    text = text_or_reason(value, text_column)
                    if isinstance(text, Unreadable):
                        yield BadDocument(f"{self.path}, {place}" if place else self.path, text.reason), position
                    else:
                        yield text, position
                    after, failures, where = position, 0, f" after {place}" if place else ""
                return
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{self.path} does not exist any more: put it back as it was, or start a run without it"
                ) from error
            except KeyError as error:
                raise ValueError(
                    f"{self.path} has no column {text_column!r}: remove the file, or set text_column to one that all "
                    f"files have. It has {error.args[0]}"
                ) from error
            except Exception as error:
                failures += 1
                if not self.remote and not isinstance(error, _DAMAGE):
                    raise
                if self.remote and failures < _ATTEMPTS:
                    # probably the network; a damaged file fails again
                    time.sleep(_WAIT * 2**failures)
                    continue
                raise ValueError(
                    f"{self.path} could not be read{where} ({type(error).__name__}: {error}): it "
                    + (
                        f"failed {failures} times; resume from the last checkpoint when it can be reached"
                        if self.remote
                        else "is damaged or was not copied completely; copy it again, or remove it and start a new run"
                    )
                ) from error

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The file's contents, decompressed."""
        if self.compression == "zstd":
            # fsspec's decompressor depends on what is installed, and may stop after the first of several frames
            with (
                fsspec.open(self.path, "rb") as packed,
                io.BufferedReader(pa.CompressedInputStream(packed, "zstd"), _BUFFER) as opened,
            ):
                yield opened
        else:
            with fsspec.open(self.path, "rb", compression=self.compression) as opened:
                yield opened

    @contextmanager
    def open_seekable(self) -> Iterator[IO[bytes]]:
        with self.open() as opened:
            yield opened if self.compression is None else io.BytesIO(opened.read())


def _parquet(file: DataFile, column: str, part: int, parts: int, start: int | None) -> Iterator[Found]:
    # a remote column chunk in one request instead of a page at a time
    with (
        file.open_seekable() as opened,
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
                for row, text in enumerate(_values(batch.column(0).slice(begin, end - begin)), position + begin + 1):
                    yield text, f"row {row}", row
            position += batch.num_rows


def _values(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        # Arrow does not check that strings are UTF-8: lose only those that are not
        plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        found = plain.cast(pa.large_binary()).to_pylist()
        return [data if data is None else data.decode("utf-8", "surrogateescape") for data in found]


def _json(file: DataFile, column: str, part: int, parts: int, start: int | None) -> Iterator[Found]:
    with file.open() as opened:
        if _is_array(opened):
            rows = json.loads(_decoded(opened.read()))
            # an array of strings is a column "text", as for datasets
            strings = column == "text" and rows and isinstance(rows[0], str)
            for index in range(max(len(rows) * part // parts, start or 0), len(rows) * (part + 1) // parts):
                text = rows[index] if strings else _text_of(rows[index], column)
                yield text, f"row {index + 1}", index + 1
        elif file.compression is None:
            yield from _lines(opened, column, part, parts, start)
        else:
            # no jump is possible: the parts take turns, and parse only their own lines
            for index, line in enumerate(opened):
                if index % parts == part and index >= (start or 0) and not line.isspace():
                    yield _text_of_line(line, column), f"line {index + 1}", index + 1


def _is_array(opened: IO[bytes]) -> bool:
    """Whether the first character is [; leaves the file at its beginning."""
    if isinstance(opened, io.BufferedReader) and not opened.seekable():
        return opened.peek(1).lstrip().startswith(b"[")
    first = b" "
    while first.isspace():
        first = opened.read(1)
    opened.seek(0)
    return first == b"["


def _lines(opened: IO[bytes], column: str, part: int, parts: int, start: int | None) -> Iterator[Found]:
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
        begin, line = position, opened.readline()
        position += len(line)
        if not line.isspace():
            yield _text_of_line(line, column), f"the line at byte {begin}", position


def _decoded(data: bytes) -> str:
    # bytes that are not UTF-8 make only the strings that hold them unreadable
    return data.decode(json.detect_encoding(data), "surrogateescape")


def _text_of_line(line: bytes, column: str) -> Any:
    try:
        row = json.loads(_decoded(line))
    except (ValueError, RecursionError) as error:
        return Unreadable(f"the line is not JSON ({error})")
    return _text_of(row, column)


def _text_of(row: Any, column: str) -> Any:
    if not isinstance(row, dict):
        return Unreadable(f"a row is {type(row).__name__}, not an object with a column {column!r}")
    return row[column] if column in row else Unreadable(f"no column {column!r}, only {', '.join(row) or 'nothing'}")


def _text(file: DataFile, column: str, part: int, parts: int, start: int | None) -> Iterator[Found]:
    if part == 0 and not start:
        with file.open() as opened:
            yield _universal_newlines(opened.read()), "", 1


def _universal_newlines(data: bytes) -> str:
    """Decoded, with the line ends of a file opened as text."""
    return data.decode("utf-8", "surrogateescape").replace("\r\n", "\n").replace("\r", "\n")


def _csv(
    file: DataFile, column: str, part: int, parts: int, start: int | None, *, delimiter: str = ","
) -> Iterator[Found]:
    # the limit of 128 Ki characters can only be changed for the whole process
    csv.field_size_limit(2**31 - 1)
    with file.open() as opened:
        # line ends inside quotes belong to the text
        lines = io.TextIOWrapper(opened, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = _csv_rows(csv.reader(lines, delimiter=delimiter, strict=True))
        names = next(rows, [column])
        if isinstance(names, csv.Error):
            raise names
        if column not in names:
            raise KeyError(", ".join(names))
        wanted = names.index(column)
        for index, row in enumerate(rows):
            if index % parts != part or index < (start or 0) or row == []:
                continue
            value: Any
            if isinstance(row, csv.Error):
                value = Unreadable(f"the row is not CSV ({row})")
            elif len(row) != len(names):
                value = Unreadable(f"the row has {len(row)} fields, the header {len(names)}")
            else:
                value = row[wanted]
            yield value, f"row {index + 1}", index + 1


def _csv_rows(reader: Iterator[list[str]]) -> Iterator[list[str] | csv.Error]:
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield error  # and go on with the next line


def _arrow(file: DataFile, column: str, part: int, parts: int, start: int | None) -> Iterator[Found]:
    with file.open_seekable() as opened:
        magic = opened.read(6)
        opened.seek(0)
        # datasets writes streams, Feather is a file
        reader = pa.ipc.open_file(opened) if magic == b"ARROW1" else pa.ipc.open_stream(opened)
        if column not in reader.schema.names:
            raise KeyError(", ".join(reader.schema.names))
        batches = map(reader.get_batch, range(reader.num_record_batches)) if magic == b"ARROW1" else reader
        before = 0
        for batch in batches:
            # the parts take turns: the first row of this part at or after `start`
            first = max(start or 0, before)
            first += (part - first) % parts
            rows = range(first, before + batch.num_rows, parts)
            values = batch.column(column)
            for index in range(0, len(rows), _BATCH_ROWS):
                chunk = rows[index : index + _BATCH_ROWS]
                taken = values.take(pa.array([row - before for row in chunk], pa.int64()))
                for text, row in zip(_values(taken), chunk, strict=True):
                    yield text, f"row {row + 1}", row + 1
            before += batch.num_rows


def _tar(file: DataFile, column: str, part: int, parts: int, start: int | None) -> Iterator[Found]:
    """WebDataset: files with the same name up to its first dot are a sample, and the rest of the name is a column."""
    wanted = (column, "txt") if column == "text" else (column,)
    with file.open() as opened, tarfile.open(fileobj=opened, mode="r|", tarinfo=_Member) as archive:
        files = (member for member in archive if member.isfile() and _sample(member)[1])
        for index, (_, members) in enumerate(groupby(files, lambda member: _sample(member)[0])):
            if index % parts != part or index < (start or 0):
                continue
            found: dict[str, Any] = {}
            for member in members:
                field = _sample(member)[1]
                content = archive.extractfile(member) if field in wanted else None
                found[field] = content and _universal_newlines(content.read())
            text = next((found[field] for field in wanted if field in found), None)
            if text is None:
                text = Unreadable(f"no file that ends in .{' or .'.join(wanted)}, only .{', .'.join(found)}")
            yield text, f"sample {index + 1}", index + 1
        while opened.read(_BUFFER):  # the checksum of a compressed archive comes last
            pass


class _Member(tarfile.TarInfo):
    """Makes an archive without an end mark an error: it was cut."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(archive)
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise OSError("the archive has no end mark") from None


def _sample(member: tarfile.TarInfo) -> tuple[str, str]:
    folder, _, name = member.name.rpartition("/")
    stem, _, field = name.partition(".")
    return f"{folder}/{stem}", field if stem else ""


_READERS: dict[str, Callable[..., Iterator[Found]]] = {
    "parquet": _parquet,
    "json": _json,
    "text": _text,
    "csv": _csv,
    "tsv": partial(_csv, delimiter="\t"),
    "arrow": _arrow,
    "tar": _tar,
}

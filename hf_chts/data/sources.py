"""Where documents come from: shards that can be cut into parts and read from any document on."""

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import datasets
from datasets.fingerprint import Hasher

from hf_chts.data.bad_documents import BadDocument, DocumentFilter, ReadDocument, Unreadable, text_or_reason
from hf_chts.data.formats import DataFile, Row
from hf_chts.data.holdout import Holdout

logger = logging.getLogger(__name__)

_READ_ROWS = 16
# Readers with fewer shards each share them in parts, so that no share is much longer than another
_WHOLE_SHARDS = 8


class Source(Protocol):
    """Documents in shards.

    Attributes:
        num_shards: at least 1.
        identity: equal for equal documents, wherever they are stored; JSON, kept in checkpoints.
        cache_key: changes with the files on this machine; None if that cannot be known.
    """

    @property
    def num_shards(self) -> int: ...

    @property
    def identity(self) -> dict[str, str | int]: ...

    @property
    def cache_key(self) -> str | None: ...

    def read(self, shard: int, part: int = 0, parts: int = 1, start: int | None = None) -> Iterator[Row]:
        """The documents of part `part` of `parts` of a shard from position `start` on, each with the position after it.

        A `BadDocument` stands for one that cannot be trained on.
        """
        ...


@dataclass(frozen=True)
class FileSource:
    """Files, each of them a shard."""

    files: Sequence[DataFile]
    text_column: str = "text"

    @property
    def num_shards(self) -> int:
        return len(self.files)

    @property
    def identity(self) -> dict[str, str | int]:
        listing = "".join(f"{file.name}\n{file.size}\n" for file in self.files)
        return {
            "files": len(self.files),
            "bytes": sum(file.size or 0 for file in self.files),
            "names and sizes": blake2b(listing.encode(), digest_size=8).hexdigest(),
            "text_column": self.text_column,
        }

    @property
    def cache_key(self) -> str:
        return Hasher.hash([self.text_column, *((file.path, file.size, file.changed) for file in self.files)])

    def read(self, shard: int, part: int = 0, parts: int = 1, start: int | None = None) -> Iterator[Row]:
        return self.files[shard].read(self.text_column, part, parts, start)


@dataclass(frozen=True)
class DatasetSource:
    """A dataset of `datasets`, for formats that `DataFile` does not read; a map-style one is one shard.

    A position is a number of rows. A streaming dataset reads the rows of the shard before it again.
    """

    documents: datasets.Dataset | datasets.IterableDataset
    text_column: str = "text"

    @property
    def num_shards(self) -> int:
        return 1 if isinstance(self.documents, datasets.Dataset) else self.documents.num_shards

    @property
    def identity(self) -> dict[str, str | int]:
        if isinstance(self.documents, datasets.Dataset):
            return {"dataset": self.documents._fingerprint, "text_column": self.text_column}
        info = self.documents.info
        return {
            "dataset": f"{info.dataset_name or info.builder_name} {info.config_name} {info.version}",
            "files": self.documents.num_shards,
            "text_column": self.text_column,
        }

    @property
    def cache_key(self) -> str | None:
        documents = self.documents
        return f"{documents._fingerprint} {self.text_column}" if isinstance(documents, datasets.Dataset) else None

    def read(self, shard: int, part: int = 0, parts: int = 1, start: int | None = None) -> Iterator[Row]:
        documents = self.documents
        if documents.column_names is not None:
            self._check_column(documents.column_names)
        if isinstance(documents, datasets.Dataset):
            rows = len(documents)
            first, last = max(rows * part // parts, start or 0), rows * (part + 1) // parts
            column = documents[self.text_column]
            for begin in range(first, last, _READ_ROWS):
                for position, text in enumerate(column[begin : min(begin + _READ_ROWS, last)], begin + 1):
                    yield self._document(text, position), position
            return
        rows_of = documents.shard(num_shards=documents.num_shards, index=shard)
        position = 0
        # `iter`, because in a dataloader worker `for row in documents` would leave out the other workers' rows
        for batch in rows_of.iter(batch_size=_READ_ROWS):
            self._check_column(batch)  # which a stream may not know before
            for text in batch[self.text_column]:
                position += 1
                if (position - 1) % parts == part and position > (start or 0):
                    yield self._document(text, position), position

    def _check_column(self, names: Collection[str]) -> None:
        if self.text_column not in names:
            raise ValueError(
                f"{self._name} has no column {self.text_column!r}: set text_column to one of {', '.join(names)}"
            )

    def _document(self, value: object, row: int) -> ReadDocument:
        text = text_or_reason(value, self.text_column)
        return BadDocument(f"{self._name}, row {row}", text.reason) if isinstance(text, Unreadable) else text

    @property
    def _name(self) -> str:
        info = self.documents.info
        return f"dataset {info.dataset_name or info.builder_name or self.documents.split or 'in memory'}"


@dataclass(frozen=True)
class Piece:
    """Part `part` of `parts` of a shard."""

    shard: int
    part: int = 0
    parts: int = 1


def pieces(num_shards: int, readers: int) -> list[Piece]:
    """The pieces that `readers` share, in corpus order: together every document once.

    Their number is a multiple of `readers`, unless there are many shards for each of them.
    """
    if num_shards >= _WHOLE_SHARDS * readers:
        return [Piece(shard) for shard in range(num_shards)]
    parts = readers // math.gcd(num_shards, readers)
    return [Piece(shard, part, parts) for shard in range(num_shards) for part in range(parts)]


def texts_of_source(
    source: Source, choice: Holdout | None = None, accept: DocumentFilter | None = None
) -> Iterator[str]:
    """The texts of all documents, or of a choice of them, in the corpus's order.

    Args:
        accept: what becomes of bad documents; by default they raise.

    Raises:
        ValueError: a document or a file is bad, or the choice is empty.
    """
    accept = DocumentFilter("error") if accept is None else accept
    found = False
    for shard in range(source.num_shards):
        for text, _ in source.read(shard):
            if accept(text) and (choice is None or choice(text)):
                found = True
                yield text
    if accept.skipped:
        logger.warning("%d of %d documents were skipped: they cannot be read", accept.skipped, accept.read)
    if choice is not None and not found:
        raise choice.empty_error(accept.read - accept.skipped)

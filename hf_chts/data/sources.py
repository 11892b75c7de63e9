"""Where the documents of a stream come from: shards that can be read from any document on, and cut into parts."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import datasets
from datasets.fingerprint import Hasher

from hf_chts.data.files import DataFile, Row

_READ_ROWS = 16
# whole shards when each reader has at least so many, parts of shards when not: the longest share is then little longer
# than the shortest
_WHOLE_SHARDS = 8


class Source(Protocol):
    """Documents in shards.

    Attributes:
        num_shards: at least 1.
        identity: what tells these documents from others, as JSON can hold it; a checkpoint keeps it.
        cache_key: what tells these very files from others on this machine; None where nothing does.
    """

    @property
    def num_shards(self) -> int: ...

    @property
    def identity(self) -> dict[str, str | int]: ...

    @property
    def cache_key(self) -> str | None: ...

    def read(self, shard: int, part: int = 0, parts: int = 1, start: int | None = None) -> Iterator[Row]:
        """The texts of part `part` of `parts` of a shard from position `start` on, each with the position after it."""
        ...


@dataclass(frozen=True)
class FileSource:
    """A shard a file."""

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

    A position is a number of rows. In a streaming one the rows of a shard before it are read again.
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
        if isinstance(documents, datasets.Dataset):
            rows = len(documents)
            first, last = max(rows * part // parts, start or 0), rows * (part + 1) // parts
            for begin in range(first, last, _READ_ROWS):
                texts = documents[begin : min(begin + _READ_ROWS, last)][self.text_column]
                yield from zip(texts, range(begin + 1, last + 1), strict=False)
            return
        rows_of = documents.shard(num_shards=documents.num_shards, index=shard)
        position = 0
        # `iter`, because in a dataloader worker `for row in documents` would leave out the other workers' rows
        for batch in rows_of.iter(batch_size=_READ_ROWS):
            for text in batch[self.text_column]:
                position += 1
                if (position - 1) % parts == part and position > (start or 0):
                    yield text, position


@dataclass(frozen=True)
class Piece:
    """Part `part` of `parts` of a shard."""

    shard: int
    part: int = 0
    parts: int = 1


def pieces(num_shards: int, readers: int) -> list[Piece]:
    """What `readers` deal out among themselves, in corpus order: together every document once.

    Their number is a multiple of `readers`, unless there are many shards for each of them.
    """
    if num_shards >= _WHOLE_SHARDS * readers:
        return [Piece(shard) for shard in range(num_shards)]
    parts = readers // math.gcd(num_shards, readers)
    return [Piece(shard, part, parts) for shard in range(num_shards) for part in range(parts)]


def texts_of_source(source: Source, keep: Callable[[str], bool] | None = None) -> Iterator[str]:
    """All texts in the corpus's order; documents without one are left out."""
    for shard in range(source.num_shards):
        for text, _ in source.read(shard):
            if text and (keep is None or keep(text)):
                yield text


@dataclass(frozen=True)
class ByText:
    """Whether a document belongs to the `fraction` that `seed` chooses, or with `rest` to what that leaves.

    A function of its text alone: so it does not depend on who reads it or on how the files are cut, and equal texts
    stay together.
    """

    fraction: float
    seed: int
    rest: bool = False

    def __call__(self, text: str) -> bool:
        key = self.seed.to_bytes(8, "little", signed=True)
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
        return (int.from_bytes(digest, "little") < int(self.fraction * 2**64)) != self.rest

    def __str__(self) -> str:
        return f"{'without ' if self.rest else ''}{self.fraction} chosen by seed {self.seed}"

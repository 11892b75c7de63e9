"""Documents of an endless stream in a shuffled order that can be resumed anywhere, from a few integers.

In each epoch the pieces get a new order and are dealt out to readers. A reader gathers a window of documents, permutes
it, and goes on to the next. Where the window begins therefore says what its shuffle buffer holds, and resuming reads
one window again and nothing before it. A place also holds the counts of documents read and skipped.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from hf_chts.data.arguments import OnBadDocument
from hf_chts.data.bad_documents import DocumentFilter
from hf_chts.data.sources import Piece, Source, pieces

# documents in a window when nothing is shuffled
_PLAIN_WINDOW = 256
# a window ends at this many characters too, so that a corpus of books fits into memory
_WINDOW_CHARACTERS = 2**25
# a reader that has found nothing after this many epochs never will
_EMPTY_EPOCHS = 100
_T = TypeVar("_T")


@dataclass(frozen=True)
class Place:
    """Where a window of a reader begins.

    Attributes:
        epoch: from 0.
        window: how many windows of the epoch came before it.
        piece: the index among the reader's pieces of this epoch.
        position: in the piece; None for its beginning.
        read, skipped: documents that the reader has read, and skipped, before it, since the run began.
    """

    epoch: int = 0
    window: int = 0
    piece: int = 0
    position: int | None = None
    read: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class ReaderState:
    """Where a reader is.

    Attributes:
        place: where its window begins.
        document, token: the next block begins with this token of this document of the window.
        skipped: bad documents up to the end of the window.
    """

    place: Place = field(default_factory=Place)
    document: int = 0
    token: int = 0
    skipped: int = 0

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "ReaderState":
        """From what `dataclasses.asdict` made of one; the first checkpoints had no counts."""
        return cls(**{**state, "place": Place(**state["place"])})


@dataclass(frozen=True)
class Shuffle:
    """How a stream is shuffled.

    Attributes:
        buffer: documents in a window; 0 keeps the corpus's own order.
        seed: of all permutations.
        restart: changes all permutations too, for a run that starts its data over; 0 for a first run.
    """

    buffer: int = 0
    seed: int = 0
    restart: int = 0

    def permutation(self, length: int, *purpose: int) -> list[int]:
        """A permutation of range(length), another one for each `purpose`; the identity without a buffer."""
        if not self.buffer:
            return list(range(length))
        generator = np.random.default_rng([abs(self.seed), self.seed < 0, self.restart, *purpose])
        return generator.permutation(length).tolist()


def windows(
    source: Source,
    shuffle: Shuffle,
    reader: int,
    readers: int,
    keep: Callable[[str], bool] | None = None,
    place: Place | None = None,
    epochs: int | None = None,
    on_bad_document: OnBadDocument | None = None,
) -> Iterator[tuple[Place, list[str], int]]:
    """The windows of one of `readers` from the one at `place` on.

    Within an epoch the readers together see every document that has text and that `keep` accepts once.

    Args:
        epochs: the first epoch that is not read; None for no end.
        on_bad_document: as for `DocumentFilter`.

    Yields:
        Where the window begins, its documents in shuffled order, and how many the reader has skipped up to its end.

    Raises:
        ValueError: this reader finds no documents, epoch after epoch; or a document is bad, or too many are.
        FileNotFoundError, ValueError: something is wrong with a file.
    """
    place = place or Place()
    accept = DocumentFilter(on_bad_document, place.read, place.skipped)
    empty = 0
    while epochs is None or place.epoch < epochs:
        found = False
        for window_place, documents in _epoch(source, shuffle, reader, readers, keep, place, accept):
            found = True
            order = shuffle.permutation(len(documents), 1, window_place.epoch, reader, window_place.window)
            yield window_place, [documents[index] for index in order], accept.skipped
        empty = 0 if found else empty + 1
        if empty >= _EMPTY_EPOCHS and epochs is None:
            raise ValueError(
                f"reader {reader} of {readers} (ranks x dataloader workers) found no documents in {empty} epochs: the "
                "corpus has too few for so many; use fewer dataloader workers or ranks, or a larger corpus"
            )
        place = Place(place.epoch + 1, read=accept.read, skipped=accept.skipped)


def _epoch(
    source: Source,
    shuffle: Shuffle,
    reader: int,
    readers: int,
    keep: Callable[[str], bool] | None,
    place: Place,
    accept: DocumentFilter,
) -> Iterator[tuple[Place, list[str]]]:
    share = pieces_of_reader(source, shuffle, reader, readers, place.epoch)
    size = shuffle.buffer or _PLAIN_WINDOW
    documents: list[str] = []
    characters, first, start = 0, place.piece, place.position
    for index, piece in enumerate(share[first:], first):
        for text, position in source.read(piece.shard, piece.part, piece.parts, start if index == first else None):
            if not accept(text) or (keep is not None and not keep(text)):
                continue
            documents.append(text)
            characters += len(text)
            if len(documents) == size or characters >= _WINDOW_CHARACTERS:
                yield place, documents
                place = Place(place.epoch, place.window + 1, index, position, accept.read, accept.skipped)
                documents, characters = [], 0
    if documents:
        yield place, documents


def pieces_of_reader(source: Source, shuffle: Shuffle, reader: int, readers: int, epoch: int) -> list[Piece]:
    """The pieces that `reader` reads in an epoch, in order."""
    every = pieces(source.num_shards, readers)
    order = shuffle.permutation(len(every), 0, epoch)
    return [every[index] for index in order[reader::readers]]


def read_ahead(items: Iterator[_T]) -> Iterator[_T]:
    """The same items; a thread gets the next one while the caller works on this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        end = object()
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]

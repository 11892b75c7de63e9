"""Documents of an endless stream in a shuffled order that can be taken up anywhere, from a few whole numbers.

The order of the pieces is drawn anew for each epoch, and dealt out to readers. A reader gathers a window of documents,
permutes it, and goes on to the next: what a buffer of that many documents holds is then known from where the window
begins, and taking up a stream reads one window again and nothing before it. Documents that cannot be read are counted
for each reader; a place holds the counts, so that a stream that is taken up goes on with them.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np

from hf_chts.data.arguments import OnBadDocument
from hf_chts.data.bad_documents import Sieve
from hf_chts.data.sources import Piece, Source, pieces

# documents in a window where nothing is shuffled
_PLAIN_WINDOW = 256
# a window ends at this many characters too, so that a corpus of books fits into memory
_WINDOW_CHARACTERS = 2**25
# a reader that finds nothing in so many epochs never will
_EMPTY_EPOCHS = 100
_T = TypeVar("_T")


@dataclass(frozen=True)
class Place:
    """Where a window begins: in which epoch, which window of the reader's it is, in which of the epoch's pieces for
    this reader, and at which position in it (None: its beginning); and how many documents the reader has read and
    skipped before, since the run began."""

    epoch: int = 0
    window: int = 0
    piece: int = 0
    position: int | None = None
    read: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class ReaderState:
    """Where a reader is: the next block begins with token `token` of document `document` of the window at `place`, and
    up to the end of that window `skipped` documents were bad."""

    place: Place = field(default_factory=Place)
    document: int = 0
    token: int = 0
    skipped: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "ReaderState":
        # without counts as long as there were none
        return cls(Place(**state["place"]), state["document"], state["token"], state.get("skipped", 0))


@dataclass(frozen=True)
class Shuffle:
    """How a stream is shuffled.

    Attributes:
        buffer: documents in a window; 0 leaves the corpus in its own order.
        seed: of all permutations.
        restart: a number that, like the seed, every permutation depends on.
    """

    buffer: int = 0
    seed: int = 0
    restart: int = 0

    def permutation(self, length: int, *purpose: int) -> list[int]:
        """A permutation of range(length) for what `purpose` numbers; the identity without a buffer."""
        if not self.buffer:
            return list(range(length))
        return (
            np.random.default_rng([abs(self.seed), self.seed < 0, self.restart, *purpose]).permutation(length).tolist()
        )


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
    """The windows of one of `readers` from the one at `place` on, each with the place where it begins and how many
    documents the reader has skipped up to its end.

    Within an epoch the readers see every document that `keep` accepts once, all of them together. Documents without
    text are left out.

    Args:
        epochs: how many epochs there are; None for no end.
        on_bad_document: as `Sieve` has it.

    Raises:
        ValueError: this reader finds no documents, epoch after epoch; or a document, or too many of them, are bad.
        FileNotFoundError, ValueError: what is wrong with a file.
    """
    place = place or Place()
    sieve = Sieve(on_bad_document, place.read, place.skipped)
    empty = 0
    while epochs is None or place.epoch < epochs:
        found = False
        for window_place, documents in _epoch(source, shuffle, reader, readers, keep, place, sieve):
            found = True
            order = shuffle.permutation(len(documents), 1, window_place.epoch, reader, window_place.window)
            yield window_place, [documents[index] for index in order], sieve.skipped
        empty = 0 if found else empty + 1
        if empty >= _EMPTY_EPOCHS and epochs is None:
            raise ValueError(
                f"reader {reader} of {readers} (ranks x dataloader workers) found no documents in {empty} epochs: the "
                "corpus has too few for so many; use fewer dataloader workers or ranks, or a larger corpus"
            )
        place = Place(place.epoch + 1, read=sieve.read, skipped=sieve.skipped)


def _epoch(
    source: Source,
    shuffle: Shuffle,
    reader: int,
    readers: int,
    keep: Callable[[str], bool] | None,
    place: Place,
    sieve: Sieve,
) -> Iterator[tuple[Place, list[str]]]:
    dealt = share(source, shuffle, reader, readers, place.epoch)
    size = shuffle.buffer or _PLAIN_WINDOW
    documents: list[str] = []
    characters = 0
    for index in range(place.piece, len(dealt)):
        piece = dealt[index]
        start = place.position if index == place.piece else None
        for text, position in source.read(piece.shard, piece.part, piece.parts, start):
            if not sieve(text) or (keep is not None and not keep(text)):
                continue
            documents.append(text)
            characters += len(text)
            if len(documents) == size or characters >= _WINDOW_CHARACTERS:
                yield place, documents
                place = Place(place.epoch, place.window + 1, index, position, sieve.read, sieve.skipped)
                documents, characters = [], 0
    if documents:
        yield place, documents


def share(source: Source, shuffle: Shuffle, reader: int, readers: int, epoch: int) -> list[Piece]:
    """The pieces that `reader` reads in an epoch, in order."""
    every = pieces(source.num_shards, readers)
    order = shuffle.permutation(len(every), 0, epoch)
    return [every[index] for index in order[reader::readers]]


def read_ahead(items: Iterator[_T]) -> Iterator[_T]:
    """The same items; while one is worked on, a thread gets the next."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        end = object()
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]

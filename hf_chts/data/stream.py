"""Blocks that are made while training, for corpora too large to prepare first, and their exact resume.

Readers are ranks x workers. Each packs its own share of the documents, and the batches of a rank's workers take turns.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from transformers import PreTrainedTokenizerBase

from hf_chts.data.arguments import OnBadDocument, Packing
from hf_chts.data.packing import Block, Documents, encode, marked_blocks, tensors
from hf_chts.data.sources import DatasetSource, Source
from hf_chts.data.tokenizer import check_eos, tokenizer_digest
from hf_chts.data.windows import Place, ReaderState, Shuffle, read_ahead, windows

# at a time: a worker is one thread, and its first block should come soon
_ENCODE_CHARACTERS = 2**17

Batch = Any
Collate = Callable[[list[dict[str, torch.Tensor]]], Batch]


class BlockStream(IterableDataset):
    """Blocks of a corpus that is read, shuffled and tokenized while training.

    `loader` gives each rank an endless stream that resumes exactly; `SparseTrainer` uses it. Iterated over, or under a
    plain `DataLoader`, it yields one epoch, shared by the dataloader's workers; `set_epoch` chooses which.

    Args:
        source: the documents; also a dataset of `datasets` with a string column `text`.
        shuffle: the window in which documents are shuffled, and the seed; by default they keep their order.
        keep: which texts belong to this stream; all by default. Its `str` identifies it in a checkpoint.
        on_bad_document: "error", "skip", or None to skip bad documents as long as they are few.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """

    def __init__(
        self,
        source: Source | Documents,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        packing: Packing = "packed",
        *,
        shuffle: Shuffle | None = None,
        keep: Callable[[str], bool] | None = None,
        on_bad_document: OnBadDocument | None = None,
    ) -> None:
        check_eos(tokenizer)
        is_dataset = isinstance(source, datasets.Dataset | datasets.IterableDataset)
        self.source: Source = DatasetSource(source) if is_dataset else source
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.packing: Packing = packing
        self.shuffle = shuffle or Shuffle()
        self.keep = keep
        # not part of the identity: it does not change which documents are read
        self.on_bad_document: OnBadDocument | None = on_bad_document
        self.epoch = 0
        self.identity: dict[str, Any] = {
            **self.source.identity,
            "shuffle_buffer": self.shuffle.buffer,
            "seed": self.shuffle.seed,
            "documents": "all" if keep is None else str(keep),
            "tokenizer": tokenizer_digest(tokenizer),
            "block_size": block_size,
            "packing": packing,
        }

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration: another order of the same documents."""
        self.epoch = epoch

    def read(
        self,
        reader: int = 0,
        readers: int = 1,
        state: ReaderState | None = None,
        *,
        shuffle: Shuffle | None = None,
        epochs: int | None = None,
    ) -> Iterator[tuple[Block, ReaderState]]:
        """The blocks of one of `readers` from `state` on, each with the state after it; endless without `epochs`.

        Packed blocks go on from one epoch to the next; only what is left after the last of `epochs` is dropped.
        """
        state = state or ReaderState()
        gathered = windows(
            self.source, shuffle or self.shuffle, reader, readers, self.keep, state.place, epochs, self.on_bad_document
        )

        def encoded() -> Iterator[tuple[tuple[Place, int, int], list[int]]]:
            first = state.document
            for place, documents, skipped in read_ahead(gathered):
                for index, tokens in enumerate(encode(documents[first:], self.tokenizer, _ENCODE_CHARACTERS), first):
                    yield (place, index, skipped), tokens
                first = 0

        made = marked_blocks(encoded(), self.tokenizer, self.block_size, self.packing, skip=state.token)
        for block, ((place, document, skipped), token) in made:
            yield block, ReaderState(place, document, token, skipped)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        reader, readers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for block, _ in self.read(reader, readers, ReaderState(Place(self.epoch)), epochs=self.epoch + 1):
            yield tensors(block)

    def loader(self, **options: Any) -> "StreamLoader":
        """Batches of this stream for one rank; the options are those of `StreamLoader`."""
        return StreamLoader(self, **options)


class StreamLoader:
    """An endless iterator over the batches of one rank.

    Each batch comes with the state of its reader after it, so that `state_dict` says where the batches that were
    *taken* end, however many the workers have made ahead.

    Args:
        stream: what to read.
        rank, ranks: which of how many processes this one is.
        batch_size: blocks in a batch.
        collate: makes a batch of a list of blocks.
        workers: worker processes of this rank; 0 reads in this process, like one worker.
        prefetch: batches that each worker makes ahead; None for torch's default of 2.
        pin_memory, context: as `pin_memory` and `multiprocessing_context` of `DataLoader`.

    Attributes:
        dataset: the stream.
    """

    def __init__(
        self,
        stream: BlockStream,
        *,
        rank: int = 0,
        ranks: int = 1,
        batch_size: int = 1,
        collate: Collate = default_collate,
        workers: int = 0,
        prefetch: int | None = None,
        pin_memory: bool = False,
        context: Any = None,
    ) -> None:
        self.dataset = stream
        self.batch_size = batch_size
        self.rank, self.ranks, self.workers = rank, ranks, max(1, workers)
        self._collate = collate
        self._options: dict[str, Any] = {
            "num_workers": workers,
            "prefetch_factor": prefetch if workers else None,
            "pin_memory": pin_memory,
            "multiprocessing_context": context if workers else None,
        }
        self.restart(0)

    def restart(self, number: int) -> None:
        """Start the data over, in another order for each `number`; 0 is the order of a first run."""
        self._restart = number
        self._next = 0  # the worker that makes the next batch
        self._states: list[dict[str, Any] | None] = [None] * self.workers

    def __iter__(self) -> Iterator[Batch]:
        """The batches after those that were taken."""
        # a dataloader always begins with its first worker
        turns = [(self._next + turn) % self.workers for turn in range(self.workers)]
        batches = _Batches(
            self.dataset,
            replace(self.dataset.shuffle, restart=self._restart),
            self.batch_size,
            self._collate,
            self.ranks * self.workers,
            [self.rank * self.workers + turn for turn in turns],
            [self._states[turn] for turn in turns],
        )
        for batch, state in DataLoader(batches, batch_size=None, **self._options):
            self._states[self._next] = state
            self._next = (self._next + 1) % self.workers
            yield batch

    @property
    def skipped(self) -> int:
        """How many bad documents this rank's readers have skipped since the run began."""
        return sum(state.get("skipped", 0) for state in self._states if state)

    def state_dict(self) -> dict[str, Any]:
        """Where the batches that were taken end, as JSON: a few numbers for each worker."""
        return {
            "ranks": self.ranks,
            "workers": self.workers,
            "rank": self.rank,
            "restart": self._restart,
            "next_worker": self._next,
            "readers": list(self._states),
            "stream": self.dataset.identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches that were taken when `state_dict` was called.

        Raises:
            ValueError: the state belongs to another stream, rank, or number of ranks or workers. Nothing changes then.
        """
        otherwise = "or start the data over in another order with --ignore_data_skip true"
        if (state["ranks"], state["workers"]) != (self.ranks, self.workers):
            raise ValueError(
                f"the data were read by {state['ranks']} ranks with {state['workers']} dataloader workers each, and "
                f"now there are {self.ranks} ranks with {self.workers}: use the same numbers, {otherwise}"
            )
        if state["rank"] != self.rank:
            raise ValueError(f"this is the state of rank {state['rank']}, not of rank {self.rank}")
        before, now = state["stream"], self.dataset.identity
        changed = [
            f"{name}: {before.get(name)} there, {now.get(name)} here"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(f"the data have changed ({'; '.join(changed)}): make them the same again, {otherwise}")
        self._restart, self._next, self._states = state["restart"], state["next_worker"], list(state["readers"])


@dataclass(eq=False)
class _Batches(IterableDataset):
    """What a dataloader's workers iterate over; `readers` and `states` have an entry for each worker."""

    stream: BlockStream
    shuffle: Shuffle
    batch_size: int
    collate: Collate
    number_of_readers: int
    readers: list[int]
    states: list[dict[str, Any] | None]

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        worker = get_worker_info()
        index = 0
        if worker is not None:
            index = worker.id
            # there are several workers already, and tokenizers warns of its threads after a fork
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        state = self.states[index]
        blocks = self.stream.read(
            self.readers[index],
            self.number_of_readers,
            ReaderState.from_dict(state) if state else None,
            shuffle=self.shuffle,
        )
        batch = []
        for block, after in blocks:
            batch.append(tensors(block))
            if len(batch) == self.batch_size:
                yield self.collate(batch), asdict(after)
                batch = []

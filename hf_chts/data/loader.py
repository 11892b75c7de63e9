"""Batches of a stream for one rank, made by worker processes, and where each of them is."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from hf_chts.data.packing import tensors
from hf_chts.data.windows import ReaderState

if TYPE_CHECKING:
    from hf_chts.data.stream import BlockStream

Batch = Any


class StreamLoader:
    """An endless iterator over the batches of one rank.

    Readers are ranks x workers; each packs its own share of the documents, and the batches of a rank's workers take
    turns. A batch comes with the state of its reader after it, so that `state_dict` tells where the batches that were
    *taken* end, however many are made already.

    Args:
        stream: what to read.
        rank, ranks: which of how many processes this one is.
        batch_size: blocks in a batch.
        collate: makes a batch of a list of blocks; torch's `default_collate` without it.
        workers: worker processes of this rank; 0 reads in this process, like one worker.
        prefetch: batches that each worker makes ahead; None for torch's default of 2.
        pin_memory: as `DataLoader` has it.
        context: how worker processes start, as `DataLoader` has it.

    Attributes:
        dataset: the stream.
    """

    def __init__(
        self,
        stream: "BlockStream",
        *,
        rank: int = 0,
        ranks: int = 1,
        batch_size: int = 1,
        collate: Callable[[list[dict[str, torch.Tensor]]], Batch] = default_collate,
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
        self._restart = 0
        self._next = 0  # the worker that makes the next batch
        self._states: list[dict[str, Any] | None] = [None] * self.workers

    def __iter__(self) -> Iterator[Batch]:
        """The batches after those that were taken."""
        batches = _Batches(
            self.dataset,
            self._restart,
            self.batch_size,
            self._collate,
            self.ranks * self.workers,
            # dataloaders begin with their first worker
            [self.rank * self.workers + (self._next + turn) % self.workers for turn in range(self.workers)],
            [self._states[(self._next + turn) % self.workers] for turn in range(self.workers)],
        )
        for batch, state in DataLoader(batches, batch_size=None, **self._options):
            self._states[self._next] = state
            self._next = (self._next + 1) % self.workers
            yield batch

    @property
    def skipped(self) -> int:
        """How many documents this rank's readers have left out since the run began, because they were bad."""
        return sum(state.get("skipped", 0) for state in self._states if state)

    def state_dict(self) -> dict[str, Any]:
        """Where the batches that were taken end: a few numbers for each worker, as JSON can hold them."""
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
            ValueError: the state is of another stream, rank, or number of ranks or workers; nothing has changed then.
        """
        for name, here in (("ranks", self.ranks), ("workers", self.workers)):
            if state[name] != here:
                raise ValueError(
                    f"the data were read by {state['ranks']} ranks with {state['workers']} dataloader workers each, "
                    f"and now there are {self.ranks} ranks with {self.workers}: use the same numbers, or begin the "
                    "data anew in another order with --ignore_data_skip true"
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
            raise ValueError(
                f"the data are not those that were read before ({'; '.join(changed)}): make them the same again, or "
                "begin the data anew in another order with --ignore_data_skip true"
            )
        self._restart, self._next, self._states = state["restart"], state["next_worker"], list(state["readers"])

    def restart(self, number: int) -> None:
        """Begin the data anew, in an order that belongs to `number`; 0 is that of a first run."""
        self._restart, self._next, self._states = number, 0, [None] * self.workers


class _Batches(IterableDataset):
    """What the workers iterate over: batches and states; `readers` and `states` are in the order of the workers."""

    def __init__(
        self,
        stream: "BlockStream",
        restart: int,
        batch_size: int,
        collate: Callable[[list[dict[str, torch.Tensor]]], Batch],
        number_of_readers: int,
        readers: list[int],
        states: list[dict[str, Any] | None],
    ) -> None:
        self.stream = stream
        self.restart = restart
        self.batch_size = batch_size
        self.collate = collate
        self.number_of_readers = number_of_readers
        self.readers = readers
        self.states = states

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        worker = get_worker_info()
        index = 0
        if worker is not None:
            index = worker.id
            # each worker is one of several processes, and tokenizers warns of its threads after a fork
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        state = self.states[index]
        shuffle = replace(self.stream.shuffle, restart=self.restart)
        blocks = self.stream.read(
            self.readers[index],
            self.number_of_readers,
            ReaderState.from_dict(state) if state else None,
            shuffle=shuffle,
        )
        batch = []
        for block, after in blocks:
            batch.append(tensors(block))
            if len(batch) == self.batch_size:
                yield self.collate(batch), after.to_dict()
                batch = []

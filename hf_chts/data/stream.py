"""Blocks made while they are read, for corpora too large to prepare first."""

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from hf_chts.data.arguments import OnBadDocument, Packing
from hf_chts.data.loader import StreamLoader
from hf_chts.data.packing import Block, Documents, check_eos, encode, marked_blocks, tensors, tokenizer_digest
from hf_chts.data.sources import DatasetSource, Source
from hf_chts.data.windows import Place, ReaderState, Shuffle, read_ahead, windows

_ENCODE_CHARACTERS = 2**17  # at a time: a worker is one thread, and the first block should not wait for more


class BlockStream(torch.utils.data.IterableDataset):
    """Blocks of a corpus that is read, shuffled and tokenized while training.

    `loader` gives an endless stream to each rank: what `SparseTrainer` uses, and what resumes exactly. Iterated over,
    or under a plain `DataLoader`, it yields one epoch, whose files the dataloader's workers share; `set_epoch` chooses
    which.

    Args:
        source: the documents; a dataset of `datasets` will do, with a string column `text`.
        shuffle: the window that documents are shuffled in, and the seed. The default leaves them in their order.
        keep: which texts belong to this stream; all without it. A checkpoint knows it by its `str`.
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
        """Which epoch the next iteration yields: another order of the same documents."""
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
        """The blocks of one of `readers` from `state` on, each with the state after it; without end unless `epochs`.

        Packed blocks go on from one epoch to the next; only what is left after the last of `epochs` is dropped.
        """
        state = state or ReaderState()

        gathered = windows(
            self.source,
            shuffle or self.shuffle,
            reader,
            readers,
            self.keep,
            state.place,
            epochs,
            self.on_bad_document,
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
        worker = torch.utils.data.get_worker_info()
        reader, readers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        first = ReaderState(Place(self.epoch))
        for block, _ in self.read(reader, readers, first, epochs=self.epoch + 1):
            yield tensors(block)

    def loader(self, **options: Any) -> StreamLoader:
        """Batches of this stream for one rank; the options are those of `StreamLoader`."""
        return StreamLoader(self, **options)

"""Blocks made while they are read, for corpora too large to prepare first."""

from collections.abc import Iterator
from itertools import islice

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from hf_chts.data.arguments import Packing
from hf_chts.data.packing import blocks, texts_of


class BlockStream(torch.utils.data.IterableDataset):
    """Blocks of a streaming corpus, for `Trainer` with `max_steps`.

    Yields the examples that `pack_blocks` would prepare, in the same order, at every iteration. With n
    dataloader workers each packs its own share of the corpus's files, so n remainders are dropped instead of
    one, and workers beyond the number of files stay idle. Ranks need nothing here: by default Accelerate
    reads on the main process and hands every rank its own rows; with `dispatch_batches=False` every rank
    reads all and keeps its own.

    A torch dataset and not `datasets.IterableDataset.from_generator`, which packs every file of its own, and
    so drops a remainder per file.

    Args:
        documents: the streaming corpus, with a string column `text_column`.
        held_out: for each shard of `documents`, how many of its first documents to leave out.
    """

    def __init__(
        self,
        documents: datasets.IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        packing: Packing = "packed",
        *,
        text_column: str = "text",
        held_out: tuple[int, ...] | None = None,
    ) -> None:
        self.documents = documents
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.packing: Packing = packing
        self.text_column = text_column
        self.held_out = held_out or (0,) * documents.num_shards

    def texts(self, worker: int = 0, num_workers: int = 1) -> Iterator[str | None]:
        """The texts for one of `num_workers` dataloader workers, shard after shard."""
        num_shards = self.documents.num_shards
        for index in range(worker, num_shards, num_workers):
            shard = self.documents.shard(num_shards=num_shards, index=index)
            yield from islice(texts_of(shard, self.text_column), self.held_out[index], None)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        texts = self.texts() if worker is None else self.texts(worker.id, worker.num_workers)
        for block in blocks(texts, self.tokenizer, self.block_size, self.packing):
            yield {column: torch.from_numpy(values).long() for column, values in block.items()}

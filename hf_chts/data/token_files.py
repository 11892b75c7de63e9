"""Tokens that were prepared ahead of training: memory-mapped shards and their index.

A shard is two files: `.tokens`, the token ids of its documents end to end, each with its EOS, little-endian uint16 or
uint32; and `.documents`, the number of tokens of each document, uint32. Blocks of any size and either packing can be
cut from it. The index is written last.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_chts.data.arguments import Packing
from hf_chts.data.packing import Block, tensors, too_short_error, truncate_and_pad
from hf_chts.data.tokenizer import padding_id, tokenizer_digest
from hf_chts.files.atomic import write_json
from hf_chts.files.reading import crc32, read_json, reading

INDEX_NAME = "hf_chts_tokens.json"
FORMAT = "hf_chts tokens, 1"


@dataclass(frozen=True)
class Shard:
    """One shard.

    Attributes:
        name: of its files, without ending.
        tokens, documents: how many it holds.
        tokens_crc, documents_crc: CRC-32 of the two files.
        skipped: bad documents of the corpus that were skipped.
    """

    name: str
    tokens: int
    documents: int
    tokens_crc: int
    documents_crc: int
    skipped: int = 0

    def check(self, directory: Path, dtype: str, contents: bool = False) -> None:
        """Raise FileNotFoundError or ValueError if a file is missing or its size, or its contents, have changed."""
        for ending, size, checksum in (
            ("tokens", self.tokens * np.dtype(dtype).itemsize, self.tokens_crc),
            ("documents", self.documents * 4, self.documents_crc),
        ):
            path = directory / f"{self.name}.{ending}"
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: run prepare again, which makes only what is missing")
            if path.stat().st_size != size:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes and should have {size}: remove it and run prepare again"
                )
            if contents and crc32(path) != checksum:
                raise ValueError(f"{path} is damaged, its checksum differs: remove it and run prepare again")


@dataclass(frozen=True)
class TokenIndex:
    """What a directory of prepared tokens holds.

    Attributes:
        source: what was tokenized and how.
        tokenizer: digest of the tokenizer.
        dtype: of the token ids, "<u2" or "<u4".
        splits: the shards of "train" and "validation", in corpus order.
    """

    source: Mapping[str, Any]
    tokenizer: str
    dtype: str
    splits: Mapping[str, Sequence[Shard]]

    def save(self, directory: Path) -> None:
        write_json(directory / INDEX_NAME, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, directory: Path) -> "TokenIndex":
        """Raise ValueError, with the file's name, if the index is damaged or of another format."""
        path = directory / INDEX_NAME
        with reading(path, "Run prepare again, into another directory"):
            contents = read_json(path, FORMAT)
            del contents["format"]
            if contents["dtype"] not in ("<u2", "<u4"):
                raise ValueError(f"its dtype is {contents['dtype']!r}")
            splits = {name: [Shard(**shard) for shard in shards] for name, shards in contents.pop("splits").items()}
            return cls(**contents, splits=splits)

    def blocks(
        self,
        directory: Path,
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        packing: Packing,
        max_blocks: int | None = None,
    ) -> "TokenBlocks":
        """The blocks of a split (the first `max_blocks`), map-style.

        Raises:
            FileNotFoundError, ValueError: a file is missing or its size has changed, there is no such split, another
                tokenizer made the tokens, or they do not fill one block.
        """
        if split not in self.splits:
            raise ValueError(f"{directory} was prepared with the splits {', '.join(self.splits)}, not {split!r}")
        if self.tokenizer != tokenizer_digest(tokenizer):
            raise ValueError(
                f"the tokens in {directory} were made with another tokenizer ({self.source['tokenizer']}): set "
                "tokenizer to that one, or prepare the corpus again"
            )
        shards = self.splits[split]
        for shard in shards:
            shard.check(directory, self.dtype)
        made = TokenBlocks(directory, shards, self.dtype, block_size, packing, padding_id(tokenizer), max_blocks)
        if not len(made):
            raise too_short_error(f"The {split} part of {directory}", sum(shard.tokens for shard in shards), block_size)
        return made


class TokenBlocks(torch.utils.data.Dataset):
    """Blocks of prepared tokens, the same as those of `pack_blocks`, read from the disk when they are asked for.

    With "packed", documents go on from one shard to the next; only what is left after the last block is dropped.
    """

    def __init__(
        self,
        directory: Path,
        shards: Sequence[Shard],
        dtype: str,
        block_size: int,
        packing: Packing,
        pad_token_id: int,
        max_blocks: int | None = None,
    ) -> None:
        self.directory = directory
        self.shards = [shard for shard in shards if shard.tokens]  # an empty file cannot be mapped
        self.dtype = dtype
        self.block_size = block_size
        self.packing: Packing = packing
        self.pad_token_id = pad_token_id
        # for each shard the number of tokens before it, and of documents
        self.token_bounds = np.cumsum([0, *(shard.tokens for shard in self.shards)])
        self.document_bounds = np.cumsum([0, *(shard.documents for shard in self.shards)])
        total = self.document_bounds[-1] if packing == "truncate_and_pad" else self.token_bounds[-1] // block_size
        self.total = int(total if max_blocks is None else min(total, max_blocks))

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.total:
            raise IndexError(f"block {index} of {self.total}")
        return tensors(self._document(index) if self.packing == "truncate_and_pad" else self._packed(index))

    def _packed(self, index: int) -> Block:
        begin, end = index * self.block_size, (index + 1) * self.block_size
        shard = int(np.searchsorted(self.token_bounds, begin, side="right")) - 1
        found: list[np.ndarray] = []
        while begin < end:
            first, last = (int(bound) for bound in self.token_bounds[shard : shard + 2])
            found.append(self._tokens[shard][begin - first : min(end, last) - first])
            begin, shard = min(end, last), shard + 1
        block = np.concatenate(found).astype(np.int32)
        return {"input_ids": block, "labels": block}

    def _document(self, index: int) -> Block:
        shard = int(np.searchsorted(self.document_bounds, index, side="right")) - 1
        ends, row = self._ends[shard], index - int(self.document_bounds[shard])
        begin = int(ends[row - 1]) if row else 0
        tokens = self._tokens[shard][begin : min(int(ends[row]), begin + self.block_size)]
        ((block, _),) = truncate_and_pad([(0, tokens)], self.block_size, self.pad_token_id)
        return block

    @cached_property
    def _tokens(self) -> list[np.ndarray]:
        return [np.memmap(self.directory / f"{shard.name}.tokens", self.dtype, "r") for shard in self.shards]

    @cached_property
    def _ends(self) -> list[np.ndarray]:
        """Where each document of each shard ends, in tokens of the shard."""
        paths = [self.directory / f"{shard.name}.documents" for shard in self.shards]
        return [np.cumsum(np.fromfile(path, "<u4"), dtype=np.int64) for path in paths]

    def __getstate__(self) -> dict[str, Any]:
        # a worker process maps the files itself
        return {name: value for name, value in self.__dict__.items() if name not in ("_tokens", "_ends")}

"""Documents turned into tokens ahead of training: memory-mapped shards and their index.

A shard is two files: `.tokens`, the token ids of its documents end to end, each with its EOS, little-endian uint16 or
uint32; and `.documents`, the number of tokens of each, uint32. So any block size and either packing can be cut from it.
The index is written last.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_chts.data.arguments import Packing
from hf_chts.data.packing import Block, tensors, tokenizer_digest, truncate_and_pad
from hf_chts.files.reading import crc32

INDEX_NAME = "hf_chts_tokens.json"
FORMAT = "hf_chts tokens, 1"


@dataclass(frozen=True)
class Shard:
    """One shard: its name without ending, how much it holds, the CRC-32 of both files, and how many documents of the
    corpus were left out because they could not be read."""

    name: str
    tokens: int
    documents: int
    tokens_crc: int
    documents_crc: int
    skipped: int = 0

    def check(self, directory: Path, dtype: str, contents: bool = False) -> None:
        """Raises FileNotFoundError or ValueError if a file is not as it was written: its size, or its contents too."""
        for ending, size, checksum in (
            ("tokens", self.tokens * np.dtype(dtype).itemsize, self.tokens_crc),
            ("documents", self.documents * 4, self.documents_crc),
        ):
            path = directory / f"{self.name}.{ending}"
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: run prepare again, it makes only what is not there")
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
        source: what was tokenized and how, as `prepare_tokens` describes it.
        tokenizer: digest of the tokenizer.
        splits: the shards of "train" and "validation", in corpus order.
    """

    source: Mapping[str, Any]
    tokenizer: str
    dtype: str
    splits: Mapping[str, Sequence[Shard]]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def load(cls, directory: Path) -> "TokenIndex":
        """Raises ValueError, with the file's name, if the index is not one or is damaged."""
        path = directory / INDEX_NAME
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
            if contents.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            if contents["dtype"] not in ("<u2", "<u4"):
                raise ValueError(f"its dtype is {contents['dtype']!r}")
            splits = {name: [Shard(**shard) for shard in shards] for name, shards in contents.pop("splits").items()}
            return cls(**contents, splits=splits)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be used ({error}): run prepare again, into another directory") from error

    def blocks(
        self,
        directory: Path,
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        packing: Packing,
        max_blocks: int | None = None,
    ) -> "TokenBlocks":
        """The blocks of a split, map-style.

        Raises:
            FileNotFoundError, ValueError: a file is missing or has another size, there is no such split, another
                tokenizer made the tokens, or they do not fill one block.
        """
        if split not in self.splits:
            raise ValueError(f"{directory} was prepared with the splits {', '.join(self.splits)}, not {split!r}")
        if self.tokenizer != tokenizer_digest(tokenizer):
            raise ValueError(
                f"the tokens in {directory} were made with another tokenizer ({self.source['tokenizer']}): set "
                "tokenizer to that one, or prepare the corpus anew"
            )
        shards = self.splits[split]
        for shard in shards:
            shard.check(directory, self.dtype)
        total = sum(shard.tokens for shard in shards)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        made = TokenBlocks(directory, shards, self.dtype, block_size, packing, pad, max_blocks)
        if not len(made):
            raise ValueError(
                f"The {split} part of {directory} holds {total} tokens, fewer than one block of "
                f"block_size={block_size}: use more or longer documents, or a smaller block_size."
            )
        return made


class TokenBlocks(torch.utils.data.Dataset):
    """Blocks of prepared tokens, read from the disk when they are asked for; as `pack_blocks` gives them.

    With "packed" documents go on from one shard to the next, and only what is left after the last block is dropped.
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
        self.shards = [shard for shard in shards if shard.tokens]  # nothing can be mapped of an empty file
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
        # a worker that is sent this maps the files itself
        return {name: value for name, value in self.__dict__.items() if name not in ("_tokens", "_ends")}

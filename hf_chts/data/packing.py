"""From documents to blocks of tokens: packed end to end, or one document in each block."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeAlias, TypeVar

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from hf_chts.data.arguments import Packing
from hf_chts.data.sources import DatasetSource, texts_of_source
from hf_chts.data.tokenizer import check_eos, padding_id, tokenizer_digest

IGNORED_LABEL = -100  # transformers' models leave these positions out of the loss
ENCODE_CHARACTERS = 2**20  # keeps the tokenizer's threads busy, however long the documents are
_CACHE_VERSION = 1  # to be raised when the same documents give other blocks

Documents: TypeAlias = datasets.Dataset | datasets.IterableDataset
Block: TypeAlias = dict[str, np.ndarray]
Mark = TypeVar("Mark")
# a block; the mark of the document it ends in, and how many of that document's tokens are used up
Marked: TypeAlias = tuple[Block, tuple[Mark, int]]


def encode(
    texts: Iterable[str | None], tokenizer: PreTrainedTokenizerBase, characters: int = ENCODE_CHARACTERS
) -> Iterator[list[int]]:
    """The token ids of each document that is not empty, followed by EOS.

    Args:
        characters: about how many the tokenizer gets at a time.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """
    check_eos(tokenizer)
    for batch in text_batches(texts, characters):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for input_ids in encoded["input_ids"]:
            yield [*input_ids, tokenizer.eos_token_id]


def count_tokens(texts: Iterable[str | None], tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens of all texts, EOS included. Raises as `encode` does."""
    return sum(map(len, encode(texts, tokenizer)))


def text_batches(texts: Iterable[str | None], characters: int = ENCODE_CHARACTERS) -> Iterator[list[str]]:
    """Lists of the texts that are not empty, each with about this many characters."""
    batch: list[str] = []
    gathered = 0
    for text in filter(None, texts):
        batch.append(text)
        gathered += len(text)
        if gathered >= characters:
            yield batch
            batch, gathered = [], 0
    if batch:
        yield batch


def pack(marked: Iterable[tuple[Mark, list[int]]], block_size: int, skip: int = 0) -> Iterator[Marked[Mark]]:
    """Documents end to end, cut every `block_size` tokens; only what is left after the last block is dropped.

    A block has `input_ids` and `labels`, the same int32 array of shape (block_size,). It has no attention mask: every
    position is a token, and a document sees those before it in its block.

    Args:
        marked: for each document a mark that identifies it, and its token ids.
        skip: how many tokens of the first document to leave out.

    Yields:
        A block; the mark of the document it ends in, and how many of that document's tokens are in it or before it.
    """
    held: list[np.ndarray] = []
    missing = block_size
    for mark, input_ids in marked:
        tokens = np.asarray(input_ids, dtype=np.int32)
        start, skip = skip, 0
        while len(tokens) - start >= missing:
            held.append(tokens[start : start + missing])
            start += missing
            block = np.concatenate(held)
            yield {"input_ids": block, "labels": block}, (mark, start)
            held, missing = [], block_size
        if start < len(tokens):
            held.append(tokens[start:])
            missing -= len(tokens) - start


def truncate_and_pad(
    marked: Iterable[tuple[Mark, Sequence[int] | np.ndarray]], block_size: int, pad_token_id: int, skip: int = 0
) -> Iterator[Marked[Mark]]:
    """One document in each block: its first `block_size` tokens, or all of them (EOS included) and padding.

    A block has `input_ids`, `attention_mask` (0 on padding) and `labels` (-100 on padding), int32, (block_size,); the
    rest is as for `pack`.
    """
    for mark, input_ids in marked:
        if skip:  # its block was yielded before
            skip = 0
            continue
        tokens = np.asarray(input_ids[:block_size], dtype=np.int32)
        padding = (0, block_size - len(tokens))
        block = {
            "input_ids": np.pad(tokens, padding, constant_values=pad_token_id),
            "attention_mask": np.pad(np.ones_like(tokens), padding),
            "labels": np.pad(tokens, padding, constant_values=IGNORED_LABEL),
        }
        yield block, (mark, len(input_ids))


def blocks(
    texts: Iterable[str | None], tokenizer: PreTrainedTokenizerBase, block_size: int, packing: Packing
) -> Iterator[Block]:
    """The blocks of `texts`, lazily and in order, by `pack` or `truncate_and_pad`. Raises as `encode`."""
    marked = marked_blocks(enumerate(encode(texts, tokenizer)), tokenizer, block_size, packing)
    return (block for block, _ in marked)


def marked_blocks(
    marked: Iterable[tuple[Mark, list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    packing: Packing,
    skip: int = 0,
) -> Iterator[Marked[Mark]]:
    """Blocks of documents' token ids by `pack` or `truncate_and_pad`, and where each ends."""
    if packing == "packed":
        return pack(marked, block_size, skip)
    if packing == "truncate_and_pad":
        return truncate_and_pad(marked, block_size, padding_id(tokenizer), skip)
    raise ValueError(f"packing={packing!r} has to be 'packed' or 'truncate_and_pad'.")


def tensors(block: Block) -> dict[str, torch.Tensor]:
    """int64 tensors, as models take them."""
    return {column: torch.from_numpy(values).long() for column, values in block.items()}


def pack_blocks(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    packing: Packing = "packed",
    *,
    text_column: str = "text",
    max_blocks: int | None = None,
    name: str = "The corpus",
) -> datasets.Dataset:
    """The blocks of `documents` (the first `max_blocks`) as `pack_texts` makes them.

    Those of a map-style dataset are cached on disk, those of a streaming one kept in memory.

    Raises:
        ValueError: the documents do not fill one block, one of them is not text, or the tokenizer has no EOS token.
    """
    key = f"{documents._fingerprint} {text_column}" if isinstance(documents, datasets.Dataset) else None
    return pack_texts(
        lambda: texts_of_source(DatasetSource(documents, text_column)),
        tokenizer,
        block_size,
        packing,
        key=key,
        max_blocks=max_blocks,
        name=name,
    )


def pack_texts(
    texts: Callable[[], Iterable[str | None]],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    packing: Packing = "packed",
    *,
    key: str | None,
    max_blocks: int | None = None,
    name: str = "The corpus",
) -> datasets.Dataset:
    """The blocks of `texts` (the first `max_blocks`) as a map-style dataset.

    Each example has `input_ids`, `labels` and, with "truncate_and_pad", `attention_mask`: int64 tensors of shape
    (block_size,). With a `key` the blocks are in `datasets`' cache on disk: memory does not grow with them, and a
    second call with the same key, tokenizer and sizes reads the file of the first. Without one they are in memory, so
    give `max_blocks`; for blocks made while training see `BlockStream`.

    Args:
        texts: each call gives all texts from the first one on.
        key: identifies these texts in the cache.
        name: what to call them in an error.

    Raises:
        ValueError: they do not fill one block, or the tokenizer has no EOS token; and whatever reading them raises.
    """
    columns = ["input_ids", "labels"] if packing == "packed" else ["input_ids", "attention_mask", "labels"]
    features = datasets.Features(
        {column: datasets.List(datasets.Value("int32"), length=block_size) for column in columns}
    )

    def generate() -> Iterator[Block]:
        return islice(blocks(texts(), tokenizer, block_size, packing), max_blocks)

    def generate_lists() -> Iterator[dict[str, list[int]]]:
        # datasets writes lists twice as fast as arrays
        for block in generate():
            yield {column: values.tolist() for column, values in block.items()}

    # before anything else, because datasets cannot write an empty dataset
    if next(generate(), None) is None:
        raise too_short_error(name, count_tokens(texts(), tokenizer), block_size)
    if key is None:
        made = list(generate())
        prepared = datasets.Dataset.from_dict(
            {column: [block[column] for block in made] for column in columns}, features=features
        )
    else:
        keys = [_CACHE_VERSION, key, tokenizer_digest(tokenizer), block_size, packing, max_blocks]
        try:
            prepared = datasets.Dataset.from_generator(generate_lists, features=features, fingerprint=Hasher.hash(keys))
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, ValueError | OSError):  # of a document, a file or the disk
                raise error.__cause__ from error.__cause__.__cause__
            raise
    return prepared.with_format("torch")


def too_short_error(name: str, tokens: int, block_size: int) -> ValueError:
    """The error for a corpus that does not fill one block."""
    return ValueError(
        f"{name} holds {tokens} tokens, fewer than one block of block_size={block_size}: "
        "use more or longer documents, or a smaller block_size."
    )

"""From documents to blocks of tokens: packed end to end, or one document a block."""

from collections.abc import Iterable, Iterator
from itertools import islice

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from hf_chts.data.arguments import Packing
from hf_chts.data.corpora import Documents

IGNORED_LABEL = -100  # the cross entropy of transformers' models leaves these positions out
_READ_ROWS = 16
_ENCODE_CHARACTERS = 2**20  # enough to keep the tokenizer's threads busy, however long the documents are
_CACHE_VERSION = 1  # raise it when the blocks made from the same documents change

Block = dict[str, np.ndarray]


def texts_of(documents: Documents, text_column: str) -> Iterator[str | None]:
    """The texts of a corpus, one by one, reading few rows at a time."""
    # `iter`, because in a dataloader worker `for row in documents` would leave out the other workers' rows
    for batch in documents.iter(batch_size=_READ_ROWS):
        yield from batch[text_column]


def encode(texts: Iterable[str | None], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of each document followed by EOS; empty documents are left out.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no eos_token, which goes between documents: "
            "set one (tokenizer.eos_token = ...) and save it, or use another tokenizer."
        )
    return _encode(texts, tokenizer)


def _encode(texts: Iterable[str | None], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    for batch in _batches(texts):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for input_ids in encoded["input_ids"]:
            yield [*input_ids, tokenizer.eos_token_id]


def _batches(texts: Iterable[str | None]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in filter(None, texts):
        batch.append(text)
        characters += len(text)
        if characters >= _ENCODE_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def pack(encoded: Iterable[list[int]], block_size: int) -> Iterator[Block]:
    """Documents end to end, cut every `block_size` tokens; only what is left after the last one is dropped.

    Yields `input_ids` and `labels`, the same int32 array of shape (block_size,). There is no attention mask:
    every position is a token, and a document sees those before it in its block.
    """
    remainder = np.empty(0, dtype=np.int32)
    for input_ids in encoded:
        tokens = np.concatenate([remainder, np.asarray(input_ids, dtype=np.int32)])
        whole = len(tokens) // block_size * block_size
        for block in tokens[:whole].reshape(-1, block_size):
            yield {"input_ids": block, "labels": block}
        remainder = tokens[whole:]


def truncate_and_pad(encoded: Iterable[list[int]], block_size: int, pad_token_id: int) -> Iterator[Block]:
    """One document a block: its first `block_size` tokens, or all of them (EOS included) and padding.

    Yields `input_ids`, `attention_mask` (0 on padding) and `labels` (-100 on padding), int32, (block_size,).
    """
    for input_ids in encoded:
        tokens = np.asarray(input_ids[:block_size], dtype=np.int32)
        padding = (0, block_size - len(tokens))
        yield {
            "input_ids": np.pad(tokens, padding, constant_values=pad_token_id),
            "attention_mask": np.pad(np.ones_like(tokens), padding),
            "labels": np.pad(tokens, padding, constant_values=IGNORED_LABEL),
        }


def blocks(
    texts: Iterable[str | None], tokenizer: PreTrainedTokenizerBase, block_size: int, packing: Packing
) -> Iterator[Block]:
    """The blocks of `texts`, lazily and in order, by `pack` or `truncate_and_pad`. Raises as `encode`."""
    encoded = encode(texts, tokenizer)
    if packing == "packed":
        return pack(encoded, block_size)
    if packing == "truncate_and_pad":
        # which id stands on padding has no effect: it is neither attended to nor predicted
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return truncate_and_pad(encoded, block_size, pad)
    raise ValueError(f"packing={packing!r} has to be 'packed' or 'truncate_and_pad'.")


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
    """The blocks of `documents` (the first `max_blocks`) as a map-style dataset.

    Each example has `input_ids`, `labels` and, with "truncate_and_pad", `attention_mask`: int64 tensors of
    shape (block_size,). A map-style corpus goes through `datasets`' cache on disk, so memory does not grow
    with it and a second call with the same documents, tokenizer and sizes reads the first one's file. A
    streaming corpus is kept in memory, so give `max_blocks`; for blocks made while training see
    `BlockStream`.

    Args:
        name: what to call the documents in an error.

    Raises:
        ValueError: the documents do not fill one block, or the tokenizer has no EOS token.
    """
    columns = ["input_ids", "labels"] if packing == "packed" else ["input_ids", "attention_mask", "labels"]
    features = datasets.Features(
        {column: datasets.List(datasets.Value("int32"), length=block_size) for column in columns}
    )

    def generate() -> Iterator[Block]:
        return islice(blocks(texts_of(documents, text_column), tokenizer, block_size, packing), max_blocks)

    def generate_lists() -> Iterator[dict[str, list[int]]]:
        # datasets writes lists twice as fast as arrays
        for block in generate():
            yield {column: values.tolist() for column, values in block.items()}

    # first of all, because datasets writes no empty dataset
    if next(generate(), None) is None:
        raise too_short(texts_of(documents, text_column), tokenizer, block_size, name)
    if isinstance(documents, datasets.IterableDataset):
        made = list(generate())
        prepared = datasets.Dataset.from_dict(
            {column: [block[column] for block in made] for column in columns}, features=features
        )
    else:
        key = [_CACHE_VERSION, documents._fingerprint, text_column, tokenizer_digest(tokenizer)]
        prepared = datasets.Dataset.from_generator(
            generate_lists,
            features=features,
            fingerprint=Hasher.hash([*key, block_size, packing, max_blocks]),
        )
    return prepared.with_format("torch")


def too_short(
    texts: Iterable[str | None], tokenizer: PreTrainedTokenizerBase, block_size: int, name: str
) -> ValueError:
    """The error for documents that do not fill one block."""
    tokens = sum(map(len, encode(texts, tokenizer)))
    return ValueError(
        f"{name} holds {tokens} tokens, fewer than one block of block_size={block_size}: "
        "use more or longer documents, or a smaller block_size."
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What identifies the token ids a tokenizer gives."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # a fast tokenizer's Python object also holds settings that do not change them
    state = tokenizer if backend is None else backend.to_str()
    return Hasher.hash([state, tokenizer.eos_token_id, tokenizer.pad_token_id])

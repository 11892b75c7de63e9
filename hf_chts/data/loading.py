"""From `DataArguments` to the blocks that a trainer needs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerBase

from hf_chts.data.arguments import DataArguments, OnBadDocument
from hf_chts.data.bad_documents import DocumentFilter
from hf_chts.data.corpora import load_source
from hf_chts.data.holdout import Holdout
from hf_chts.data.packing import blocks, count_tokens, pack_texts, too_short_error
from hf_chts.data.sources import Source, texts_of_source
from hf_chts.data.stream import BlockStream
from hf_chts.data.token_files import INDEX_NAME, TokenBlocks, TokenIndex
from hf_chts.data.tokenizer import load_tokenizer
from hf_chts.data.windows import Shuffle


@dataclass(frozen=True)
class LoadedData:
    """Blocks to train and to validate on, and the tokenizer they were made with.

    Every example has int64 tensors of shape (block_size,): `input_ids`, `labels` and, with
    `packing="truncate_and_pad"`, `attention_mask`. `validation` is always finite.
    """

    train: datasets.Dataset | BlockStream | TokenBlocks
    validation: datasets.Dataset | TokenBlocks
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Corpus:
    """Sources to train and to validate on, and the choice of their documents: None for all of them."""

    train: Source
    validation: Source
    kept: Holdout | None
    held_out: Holdout | None


def load_data(args: DataArguments, *, vocab_size: int, seed: int, shuffle_seed: int | None = None) -> LoadedData:
    """Load the tokenizer and the corpus, and make blocks of tokens.

    With several processes, call it inside `training_args.main_process_first()`: the first one fills the caches that
    the others read.

    Args:
        vocab_size: the model's vocabulary size, in tokens.
        seed: chooses the held-out documents when the corpus has no validation split.
        shuffle_seed: of a stream's order; by default `seed`.

    Raises:
        FileNotFoundError, ValueError: something is wrong with the corpus or the tokenizer.
    """
    tokenizer = load_tokenizer(args.tokenizer or "embedded", vocab_size)
    max_blocks = None if args.max_eval_tokens is None else args.max_eval_tokens // args.block_size
    directory = Path(args.dataset).expanduser()
    if args.dataset != "embedded" and (directory / INDEX_NAME).is_file():
        index = TokenIndex.load(directory)
        cut = partial(index.blocks, directory, tokenizer=tokenizer, block_size=args.block_size, packing=args.packing)
        return LoadedData(cut("train"), cut("validation", max_blocks=max_blocks), tokenizer)
    corpus = load_corpus(args, seed, download=not args.streaming)
    # a finite part is read completely before training starts: a bad document is an error unless the user allows it
    policy: OnBadDocument = args.on_bad_document or "error"

    def packed(source: Source, choice: Holdout | None, name: str, max_blocks: int | None = None) -> datasets.Dataset:
        return pack_texts(
            lambda: texts_of_source(source, choice, DocumentFilter(policy)),
            tokenizer,
            args.block_size,
            args.packing,
            # a run that refuses bad documents must not reuse blocks that were made while skipping them
            key=None if source.cache_key is None else f"{source.cache_key} {choice} {policy}",
            max_blocks=max_blocks,
            name=name,
        )

    validation_name = f"The validation part of dataset {args.dataset!r}"
    validation = packed(corpus.validation, corpus.held_out, validation_name, max_blocks)
    train_name = f"Split {args.dataset_split!r} of dataset {args.dataset!r}"
    if not args.streaming:
        return LoadedData(packed(corpus.train, corpus.kept, train_name), validation, tokenizer)

    def texts() -> Iterator[str]:
        return texts_of_source(corpus.train, corpus.kept, DocumentFilter(args.on_bad_document))

    # a stream that cannot fill one block would be read for ever
    if next(blocks(texts(), tokenizer, args.block_size, args.packing), None) is None:
        raise too_short_error(train_name, count_tokens(texts(), tokenizer), args.block_size)
    train = BlockStream(
        corpus.train,
        tokenizer,
        args.block_size,
        args.packing,
        shuffle=Shuffle(args.shuffle_buffer, seed if shuffle_seed is None else shuffle_seed),
        keep=corpus.kept,
        on_bad_document=args.on_bad_document,
    )
    return LoadedData(train, validation, tokenizer)


def load_corpus(args: DataArguments, seed: int, *, download: bool = False) -> Corpus:
    """The documents, and which of them are held out: the validation split, or a fraction chosen by `seed`.

    Args:
        download: copy files of the Hub first, for documents that are read more than once.

    Raises:
        FileNotFoundError, ValueError: something is wrong with the corpus.
    """
    load: Callable[[str], Source] = partial(
        load_source,
        args.dataset,
        config=args.dataset_config,
        text_column=args.text_column,
        on_bad_document=args.on_bad_document or "error",
        download=download,
    )
    train = load(args.dataset_split)
    validation_split = args.validation_split or ("validation" if args.dataset == "embedded" else None)
    if validation_split is not None:
        return Corpus(train, load(validation_split), None, None)
    fraction = args.validation_fraction
    return Corpus(train, train, Holdout(fraction, seed, rest=True), Holdout(fraction, seed))

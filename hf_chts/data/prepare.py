"""From `DataArguments` to what a trainer needs."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_chts.data.arguments import DataArguments, OnBadDocument
from hf_chts.data.bad_documents import Sieve
from hf_chts.data.corpora import load_source
from hf_chts.data.embedded import embedded_tokenizer
from hf_chts.data.holdout import ByText
from hf_chts.data.packing import blocks, pack_texts, too_short
from hf_chts.data.sources import Source, texts_of_source
from hf_chts.data.stream import BlockStream
from hf_chts.data.token_files import INDEX_NAME, TokenBlocks, TokenIndex
from hf_chts.data.windows import Shuffle


@dataclass(frozen=True)
class PreparedData:
    """Blocks to train and to validate on, and the tokenizer they were made with.

    Every example has int64 tensors of shape (block_size,): `input_ids`, `labels` and, with
    `packing="truncate_and_pad"`, `attention_mask`. `validation` is always finite.
    """

    train: datasets.Dataset | BlockStream | TokenBlocks
    validation: datasets.Dataset | TokenBlocks
    tokenizer: PreTrainedTokenizerBase


def load_data(args: DataArguments, *, vocab_size: int, seed: int, shuffle_seed: int | None = None) -> PreparedData:
    """Load the tokenizer and the corpus, and make blocks of tokens.

    With several processes, call it inside `training_args.main_process_first()`: the first one fills the
    caches that the others read.

    Args:
        vocab_size: the model's vocabulary size, in tokens.
        seed: chooses the held-out documents when the corpus has no validation split.
        shuffle_seed: of a stream's order; `seed` without it.

    Raises:
        FileNotFoundError, ValueError: something is wrong with the corpus or the tokenizer; before any
            training.
    """
    tokenizer = load_tokenizer(args.tokenizer, vocab_size)
    if is_prepared(args.dataset):
        return _prepared(args, tokenizer)
    corpus = split_source(args, seed, download=not args.streaming)
    validation = _packed(
        args,
        tokenizer,
        corpus.validation,
        corpus.held_out,
        max_blocks=_max_blocks(args),
        name=f"The validation part of dataset {args.dataset!r}",
    )
    if args.streaming:
        train = _stream(args, tokenizer, corpus, seed if shuffle_seed is None else shuffle_seed)
    else:
        train = _packed(args, tokenizer, corpus.train, corpus.kept, name=_train_name(args))
    return PreparedData(train, validation, tokenizer)


def is_prepared(dataset: str) -> bool:
    """Whether `dataset` is a directory of prepared tokens."""
    return dataset != "embedded" and (Path(dataset).expanduser() / INDEX_NAME).is_file()


def _prepared(args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    directory = Path(args.dataset).expanduser()
    index = TokenIndex.load(directory)
    cut = partial(index.blocks, directory, tokenizer=tokenizer, block_size=args.block_size, packing=args.packing)
    return PreparedData(cut("train"), cut("validation", max_blocks=_max_blocks(args)), tokenizer)


def _packed(
    args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    choice: ByText | None,
    *,
    name: str,
    max_blocks: int | None = None,
) -> datasets.Dataset:
    return pack_texts(
        lambda: texts_of_source(source, choice, Sieve(_before_training(args))),
        tokenizer,
        args.block_size,
        args.packing,
        # what was made while bad documents were skipped is not for a run that refuses them
        key=None if source.cache_key is None else f"{source.cache_key} {choice} {_before_training(args)}",
        max_blocks=max_blocks,
        name=name,
    )


def _before_training(args: DataArguments) -> OnBadDocument:
    """What becomes of bad documents where all are read before training starts."""
    return args.on_bad_document or "error"


def _stream(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, corpus: "SplitSource", shuffle_seed: int
) -> BlockStream:
    def texts() -> Iterator[str]:
        return texts_of_source(corpus.train, corpus.kept, Sieve(args.on_bad_document))

    # the first block already, because a stream that never fills one would never end
    if next(blocks(texts(), tokenizer, args.block_size, args.packing), None) is None:
        raise too_short(texts(), tokenizer, args.block_size, _train_name(args))
    return BlockStream(
        corpus.train,
        tokenizer,
        args.block_size,
        args.packing,
        shuffle=Shuffle(args.shuffle_buffer, shuffle_seed),
        keep=corpus.kept,
        on_bad_document=args.on_bad_document,
    )


@dataclass(frozen=True)
class SplitSource:
    """What to train and to validate on; None for a choice of documents stands for all of them."""

    train: Source
    validation: Source
    kept: ByText | None
    held_out: ByText | None


def split_source(args: DataArguments, seed: int, *, download: bool = False) -> SplitSource:
    """The documents, and which of them are held out: the validation split, or a fraction by `seed`.

    Args:
        download: copy files of the Hub first, for documents that are read more than once.

    Raises:
        FileNotFoundError, ValueError: something is wrong with the corpus.
    """
    load = partial(
        load_source,
        args.dataset,
        config=args.dataset_config,
        text_column=args.text_column,
        on_bad_document=_before_training(args),
        download=download,
    )
    train = load(args.dataset_split)
    validation_split = own_validation_split(args)
    if validation_split is not None:
        return SplitSource(train, load(validation_split), None, None)
    fraction = args.validation_fraction
    return SplitSource(train, train, ByText(fraction, seed, rest=True), ByText(fraction, seed))


def own_validation_split(args: DataArguments) -> str | None:
    """The split to validate on; None where documents are held out of the training split."""
    return args.validation_split or ("validation" if args.dataset == "embedded" else None)


def _max_blocks(args: DataArguments) -> int | None:
    return None if args.max_eval_tokens is None else args.max_eval_tokens // args.block_size


def _train_name(args: DataArguments) -> str:
    return f"Split {args.dataset_split!r} of dataset {args.dataset!r}"


def load_tokenizer(tokenizer: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """The embedded tokenizer with `vocab_size` tokens, or the one of a directory or Hub id.

    Raises:
        ValueError: it cannot be loaded, or its vocabulary is larger than the model's.
    """
    if tokenizer == "embedded":
        return embedded_tokenizer(vocab_size)
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except Exception as error:
        raise ValueError(
            f"tokenizer {tokenizer!r} could not be loaded ({type(error).__name__}: {error}): give a "
            "directory that has tokenizer files, a Hub id that can be reached, or 'embedded'."
        ) from error
    needed = max(loaded.get_vocab().values()) + 1
    if needed > vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer!r} has {needed} tokens, more than the model's vocab_size={vocab_size}: "
            f"set the model's vocab_size to {needed} or more, or use a smaller tokenizer."
        )
    return loaded

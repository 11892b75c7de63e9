"""From `DataArguments` to what a trainer needs."""

from dataclasses import dataclass

import datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_chts.data.arguments import DataArguments
from hf_chts.data.corpora import Documents, load_documents
from hf_chts.data.embedded import embedded_tokenizer
from hf_chts.data.holdout import hold_out_first, hold_out_fraction
from hf_chts.data.packing import pack_blocks, too_short
from hf_chts.data.stream import BlockStream


@dataclass(frozen=True)
class PreparedData:
    """Blocks to train and to validate on, and the tokenizer they were made with.

    Every example has int64 tensors of shape (block_size,): `input_ids`, `labels` and, with
    `packing="truncate_and_pad"`, `attention_mask`. `validation` is always finite.
    """

    train: datasets.Dataset | BlockStream
    validation: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase


def load_data(args: DataArguments, *, vocab_size: int, seed: int) -> PreparedData:
    """Load the tokenizer and the corpus, and make blocks of tokens.

    With several processes, call it inside `training_args.main_process_first()`: the first one fills the
    caches that the others read.

    Args:
        vocab_size: the model's vocabulary size, in tokens.
        seed: chooses the held-out documents when a map-style corpus has no validation split.

    Raises:
        FileNotFoundError, ValueError: something is wrong with the corpus or the tokenizer; before any
            training.
    """
    tokenizer = load_tokenizer(args.tokenizer, vocab_size)
    documents = _load_split(args, args.dataset_split)
    held_out = None
    validation_split = args.validation_split or ("validation" if args.dataset == "embedded" else None)
    if validation_split is not None:
        validation_documents = _load_split(args, validation_split)
    elif args.streaming:
        held_out, validation_documents = hold_out_first(documents, args.validation_documents, args.text_column)
    else:
        documents, validation_documents = hold_out_fraction(documents, args.validation_fraction, seed)

    validation = pack_blocks(
        validation_documents,
        tokenizer,
        args.block_size,
        args.packing,
        text_column=args.text_column,
        max_blocks=None if args.max_eval_tokens is None else args.max_eval_tokens // args.block_size,
        name=f"The validation part of dataset {args.dataset!r}",
    )
    name = f"Split {args.dataset_split!r} of dataset {args.dataset!r}"
    train: datasets.Dataset | BlockStream
    if args.streaming:
        train = BlockStream(
            documents,
            tokenizer,
            args.block_size,
            args.packing,
            text_column=args.text_column,
            held_out=held_out,
        )
        if next(iter(train), None) is None:
            raise too_short(train.texts(), tokenizer, args.block_size, name)
    else:
        train = pack_blocks(
            documents, tokenizer, args.block_size, args.packing, text_column=args.text_column, name=name
        )
    return PreparedData(train, validation, tokenizer)


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


def _load_split(args: DataArguments, split: str) -> Documents:
    return load_documents(
        args.dataset,
        split,
        config=args.dataset_config,
        text_column=args.text_column,
        streaming=args.streaming,
    )

"""Tokenizers: loading, a digest to compare them by, and how many bytes of text each token stands for."""

import re

import torch
from datasets.fingerprint import Hasher
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_chts.data.embedded import embedded_tokenizer

_BYTE_FALLBACK = re.compile(r"<0x[0-9A-Fa-f]{2}>")


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
            f"tokenizer {tokenizer!r} could not be loaded ({type(error).__name__}: {error}): give a directory with "
            "tokenizer files, a Hub id that can be reached, or 'embedded'."
        ) from error
    needed = max(loaded.get_vocab().values()) + 1
    if needed > vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer!r} has {needed} tokens, more than the model's vocab_size={vocab_size}: "
            f"set the model's vocab_size to {needed} or more, or use a smaller tokenizer."
        )
    return loaded


def check_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if the tokenizer has no EOS token."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no eos_token, which goes between documents: "
            "set one (tokenizer.eos_token = ...) and save it, or use another tokenizer."
        )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id to pad blocks with. It does not matter which: padding is neither attended to nor predicted."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for two tokenizers that give the same token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # the Python object of a fast tokenizer also holds settings that do not change the ids
    state = tokenizer if backend is None else backend.to_str()
    return Hasher.hash([state, tokenizer.eos_token_id, tokenizer.pad_token_id])


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """Number of UTF-8 bytes each token id stands for, int64 of shape (vocab_size,); turns a loss into bits per byte.

    Exact for byte-level BPE: over the tokens of a text they add up to `len(text.encode())`. In a SentencePiece
    vocabulary `▁` counts as one byte, the space it stands for, and `<0x0A>` as one. Special tokens, and ids that the
    tokenizer does not have, count as 0.

    Raises:
        ValueError: the tokenizer has ids of `vocab_size` or more.
    """
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values())
    if largest >= vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {largest}, too large for vocab_size={vocab_size}: "
            f"use a vocab_size of at least {largest + 1}, or a smaller tokenizer."
        )
    byte_level = _is_byte_level(tokenizer)
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    lengths = torch.zeros(vocab_size, dtype=torch.long)
    for token, index in vocabulary.items():
        if index in special:
            continue
        if index in added:
            lengths[index] = len(token.encode())  # the vocabulary spells added tokens as the text does
        elif byte_level:
            lengths[index] = len(token)  # one character of the alphabet per byte
        elif _BYTE_FALLBACK.fullmatch(token):
            lengths[index] = 1
        else:
            lengths[index] = len(token.replace("▁", " ").encode())
    return lengths


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the vocabulary is written in the byte-level alphabet, which the tokenizer's class does not show."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return "ByteLevel" in str(backend.decoder)
    vocabulary = tokenizer.get_vocab()
    return all(character in vocabulary for character in ByteLevel.alphabet())

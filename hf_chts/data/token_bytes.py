"""How many bytes of text each token stands for: what turns a loss per token into bits per byte."""

import re

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

_BYTE_FALLBACK = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """Number of UTF-8 bytes each token id stands for, int64 of shape (vocab_size,).

    Exact for byte-level BPE: over the tokens of a text they add up to `len(text.encode())`. In a
    SentencePiece vocabulary `▁` counts as one byte, the space it stands for, and `<0x0A>` as one. Special
    tokens, and ids that the tokenizer does not have, count as 0.

    Raises:
        ValueError: the tokenizer has ids of `vocab_size` or more.
    """
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values())
    if largest >= vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {largest}, which vocab_size={vocab_size} has no room for: "
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
            lengths[index] = len(token.encode())  # added tokens stand in the vocabulary as in the text
        elif byte_level:
            lengths[index] = len(token)  # one character of the alphabet per byte
        elif _BYTE_FALLBACK.fullmatch(token):
            lengths[index] = 1
        else:
            lengths[index] = len(token.replace("▁", " ").encode())
    return lengths


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the vocabulary is written in the byte-level alphabet; a class's name does not tell."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return "ByteLevel" in str(backend.decoder)
    vocabulary = tokenizer.get_vocab()
    return all(character in vocabulary for character in ByteLevel.alphabet())

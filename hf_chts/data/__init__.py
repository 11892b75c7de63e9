"""Corpora, tokenizers and blocks of tokens."""

from hf_chts.data.arguments import DataArguments
from hf_chts.data.corpora import load_source
from hf_chts.data.embedded import SPLITS, Document, embedded_dataset, embedded_documents, embedded_tokenizer
from hf_chts.data.packing import pack_blocks
from hf_chts.data.prepare import PreparedData, load_data, load_tokenizer
from hf_chts.data.sources import DatasetSource, FileSource, Source
from hf_chts.data.stream import BlockStream
from hf_chts.data.token_bytes import token_byte_lengths
from hf_chts.data.windows import Shuffle

__all__ = [
    "SPLITS",
    "BlockStream",
    "DataArguments",
    "DatasetSource",
    "Document",
    "FileSource",
    "PreparedData",
    "Shuffle",
    "Source",
    "embedded_dataset",
    "embedded_documents",
    "embedded_tokenizer",
    "load_data",
    "load_source",
    "load_tokenizer",
    "pack_blocks",
    "token_byte_lengths",
]

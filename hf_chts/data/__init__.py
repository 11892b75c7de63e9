"""Corpora, tokenizers and blocks of tokens."""

from hf_chts.lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "arguments": ["DataArguments"],
        "corpora": ["load_source"],
        "embedded": ["SPLITS", "Document", "embedded_dataset", "embedded_documents", "embedded_tokenizer"],
        "loading": ["LoadedData", "load_data"],
        "packing": ["pack_blocks"],
        "sources": ["DatasetSource", "FileSource", "Source"],
        "stream": ["BlockStream"],
        "tokenizer": ["load_tokenizer", "token_byte_lengths"],
        "windows": ["Shuffle"],
    },
    renamed={"PreparedData": "LoadedData"},
)

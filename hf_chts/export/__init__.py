"""From a sparse model to files: directories that plain transformers loads, packed directories, and the Hub."""

from hf_chts.lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "convert": ["pack_directory", "unpack_directory"],
        "directory": ["export_sparse"],
        "hub": ["push_directory"],
        "hub_errors": ["PushFailed"],
        "loading": ["load_sparse"],
    },
)

"""From a sparse model to files: directories that plain transformers loads, packed directories, and the Hub."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_chts.export.convert import pack_directory, unpack_directory
    from hf_chts.export.directory import export_sparse
    from hf_chts.export.hub import push_directory
    from hf_chts.export.hub_errors import PushFailed
    from hf_chts.export.loading import load_sparse

__all__ = ["PushFailed", "export_sparse", "load_sparse", "pack_directory", "push_directory", "unpack_directory"]

# imported when they are used, for most of them need transformers
_MODULES = {
    "PushFailed": "hub_errors",
    "export_sparse": "directory",
    "load_sparse": "loading",
    "pack_directory": "convert",
    "push_directory": "hub",
    "unpack_directory": "convert",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

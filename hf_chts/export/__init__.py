"""The way out of training: directories that plain transformers and the lm-eval harness load, or packed ones."""

from hf_chts.export.convert import pack_directory, unpack_directory
from hf_chts.export.directory import export_sparse, load_sparse

__all__ = ["export_sparse", "load_sparse", "pack_directory", "unpack_directory"]

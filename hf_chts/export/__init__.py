"""The way out of training: directories that plain transformers and the lm-eval harness load, or packed ones."""

from hf_chts.export.convert import pack_directory, unpack_directory
from hf_chts.export.directory import export_sparse
from hf_chts.export.hub import push_directory
from hf_chts.export.hub_errors import PushFailed
from hf_chts.export.loading import load_sparse

__all__ = ["PushFailed", "export_sparse", "load_sparse", "pack_directory", "push_directory", "unpack_directory"]

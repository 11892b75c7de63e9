"""The way out of training: directories that plain transformers and the lm-eval harness load."""

from hf_chts.export.directory import export_sparse, load_sparse

__all__ = ["export_sparse", "load_sparse"]

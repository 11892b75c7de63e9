"""hf_chts: sparse language-model pretraining with Cannistraci-Hebb Training inside Hugging Face Transformers."""

from hf_chts.config import SparsityConfig
from hf_chts.export import export_sparse, load_sparse
from hf_chts.layers.masked_linear import MaskedConv1D, MaskedLinear
from hf_chts.sparse_model import SparsityHandle, sparsify
from hf_chts.training.arguments import SparseTrainingArguments
from hf_chts.training.callback import TopologyCallback
from hf_chts.training.trainer import SparseTrainer, SparseTrainerMixin

__version__ = "0.1.0"

__all__ = [
    "MaskedConv1D",
    "MaskedLinear",
    "SparseTrainer",
    "SparseTrainerMixin",
    "SparseTrainingArguments",
    "SparsityConfig",
    "SparsityHandle",
    "TopologyCallback",
    "export_sparse",
    "load_sparse",
    "sparsify",
]

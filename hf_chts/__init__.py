"""hf_chts: sparse language-model pretraining with Cannistraci-Hebb Training inside Hugging Face Transformers."""
# ruff: noqa: F401 - __all__ is made of the table below

from typing import TYPE_CHECKING

from hf_chts.export.registration import register_packed_loading
from hf_chts.lazy import lazy_names

if TYPE_CHECKING:  # for type checkers and editors; at run time a name is imported when it is first used
    from hf_chts.config import SparsityConfig
    from hf_chts.evolution.evolver import Evolver
    from hf_chts.export.directory import export_sparse
    from hf_chts.export.loading import load_sparse
    from hf_chts.layers.masked_linear import MaskedConv1D, MaskedLinear
    from hf_chts.sparse_model import SparsityHandle, sparsify
    from hf_chts.topology.parts import register
    from hf_chts.training.arguments import SparseTrainingArguments
    from hf_chts.training.callback import TopologyCallback
    from hf_chts.training.trainer import SparseTrainer, SparseTrainerMixin

__version__ = "0.1.0"

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "config": ["SparsityConfig"],
        "evolution.evolver": ["Evolver"],
        "export.directory": ["export_sparse"],
        "export.loading": ["load_sparse"],
        "layers.masked_linear": ["MaskedConv1D", "MaskedLinear"],
        "sparse_model": ["SparsityHandle", "sparsify"],
        "topology.parts": ["register"],
        "training.arguments": ["SparseTrainingArguments"],
        "training.callback": ["TopologyCallback"],
        "training.trainer": ["SparseTrainer", "SparseTrainerMixin"],
    },
    renamed={"SparseModel": "SparsityHandle"},
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# so that plain `from_pretrained` loads packed directories
register_packed_loading()

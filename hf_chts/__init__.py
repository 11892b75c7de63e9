"""hf_chts: sparse language-model pretraining with Cannistraci-Hebb Training inside Hugging Face Transformers."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_chts.export.registration import register_packed_loading

if TYPE_CHECKING:  # for type checkers and editors; at run time each name is imported when it is asked for
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

_WHERE = {
    "Evolver": "hf_chts.evolution.evolver",
    "MaskedConv1D": "hf_chts.layers.masked_linear",
    "MaskedLinear": "hf_chts.layers.masked_linear",
    "SparseTrainer": "hf_chts.training.trainer",
    "SparseTrainerMixin": "hf_chts.training.trainer",
    "SparseTrainingArguments": "hf_chts.training.arguments",
    "SparsityConfig": "hf_chts.config",
    "SparsityHandle": "hf_chts.sparse_model",
    "TopologyCallback": "hf_chts.training.callback",
    "export_sparse": "hf_chts.export.directory",
    "load_sparse": "hf_chts.export.loading",
    "register": "hf_chts.topology.parts",
    "sparsify": "hf_chts.sparse_model",
}
_OLD_NAMES = {"SparseModel": "SparsityHandle"}

__all__ = [
    "Evolver",
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
    "register",
    "sparsify",
]


def __getattr__(name: str) -> Any:
    if name in _OLD_NAMES:
        new = _OLD_NAMES[name]
        warnings.warn(f"hf_chts.{name} is called hf_chts.{new} now", DeprecationWarning, stacklevel=2)
        return __getattr__(new)
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})


# so that plain `from_pretrained` loads packed directories wherever hf_chts was imported
register_packed_loading()

"""Load the weights of a checkpoint under the names that they have in the model.

`save_pretrained` writes some models in the format of their first checkpoints: Mixtral's experts one by one, ViT's
queries as `attention.attention.query`. `from_pretrained` converts them back. The Trainer, to resume, reads the file
without converting, and would leave such weights as they were initialized.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from hf_chts.layers.linked_layer import LinkedLayer
from hf_chts.layers.sparse_layer import SparseLayer
from hf_chts.layers.wrappers import original_name, unwrap

_VALUES = LinkedLayer.parameter_name


@contextmanager
def names_of_model(model: nn.Module, directory: str | Path) -> Iterator[None]:
    """In the block, `model`, wrapped or not, accepts state dicts with the names of the files in `directory`.

    Weights that `directory` lacks keep their values, and are reported as missing.
    """
    inner = unwrap(model)
    read: dict[str, Tensor] | None = None  # kept, because a checkpoint in several files is loaded file by file

    def rename(module: nn.Module, state: dict[str, Tensor], *others: Any) -> None:
        nonlocal read
        own = {original_name(key) for key in module.state_dict(keep_vars=True)}
        own |= {  # of a run with the other storage
            original_name(f"{name}.{layer.other_name}")
            for name, layer in module.named_modules()
            if isinstance(layer, SparseLayer)
        }
        if all(original_name(key) in own for key in state) or not isinstance(inner, PreTrainedModel):
            return
        if read is None:
            read = _read(inner, directory)
        values = _renamed({key: value for key, value in state.items() if key.endswith(f".{_VALUES}")}, inner, own)
        state.clear()
        state.update(read | values)

    handle = model.register_load_state_dict_pre_hook(rename)
    try:
        yield
    finally:
        handle.remove()


def _renamed(values: dict[str, Tensor], model: PreTrainedModel, own: set[str]) -> dict[str, Tensor]:
    """The values of links by their names in the model, which `from_pretrained` would take for left over."""
    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    known = dict.fromkeys(own, True)
    return {
        key if key in own else rename_source_key(key, renamings, [], model.base_model_prefix, known)[0]: value
        for key, value in values.items()
    }


def _read(model: PreTrainedModel, directory: str | Path) -> dict[str, Tensor]:
    """The weights in `directory`, by their names in a model of this class and config."""
    found: Any = type(model).from_pretrained(
        directory, config=copy.deepcopy(model.config), trust_remote_code=False, output_loading_info=True
    )
    loaded, info = found
    return {key: value for key, value in loaded.state_dict().items() if key not in info["missing_keys"]}

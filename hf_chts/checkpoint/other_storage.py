"""Resuming a run of sparse layers that keep their weights in the other way: optimizer state is turned into theirs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_chts.layers.sparse_layer import SparseLayer


@contextmanager
def converting_state(optimizer: Any, layers: Iterable[SparseLayer]) -> Iterator[None]:
    """Have an optimizer of torch's take, in the block, the state of a run with the other storage as well as its own.

    The topology of that run has been restored.

    Raises:
        ValueError: when it is loaded, the state has tensors that are neither a number nor a value for each weight.
    """
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__module__.startswith("accelerate."):
        if not hasattr(optimizer, "optimizer"):
            yield
            return
        optimizer = optimizer.optimizer
    owners = {id(layer.parameter): layer for layer in layers}

    def convert(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = dict(state_dict["state"])
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
            for parameter, number in zip(group["params"], saved["params"], strict=True):
                layer = owners.get(id(parameter))
                if layer is not None and layer.storage.foreign and number in state:
                    state[number] = {key: _converted(layer, value) for key, value in state[number].items()}
        return {**state_dict, "state": state}

    hook = optimizer.register_load_state_dict_pre_hook(convert)
    try:
        yield
    finally:
        hook.remove()


def _converted(layer: SparseLayer, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:  # the number of steps, say
        return value
    return layer.storage.converted(value)

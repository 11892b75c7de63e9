"""A model that was made sparse on the meta device gets its weights, without ever being dense.

The new weights of the links have the distribution that transformers would give the dense ones: block after block of the
model is made dense, initialized by the model's own rules, and reduced to its links.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_chts.layers.linked_layer import LinkedLayer
from hf_chts.layers.sparse_layer import rename_parameter
from hf_chts.names import listed


@torch.no_grad()
def materialize(model: PreTrainedModel, device: torch.device | str = "cpu") -> None:
    """Give a model on the meta device new weights on a real one, from the global random generator.

    Raises:
        ValueError: some of its weights are not on the meta device, or the model's rules of initialization leave some as
            the constructor made them.
    """
    there = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    if there:
        raise ValueError(f"{there[0]} has a value already: only a model that is on the meta device can get new weights")
    device, blocks = torch.device(device), list(linked_blocks(model, model))
    for block, owner in blocks:
        _fill(block, owner, device, done=set())
    _fill(model, model, device, done={block for block, _ in blocks})
    model.tie_weights()
    if left := [name for name, parameter in model.named_parameters() if bool(parameter.isnan().any())]:
        raise ValueError(
            f"the rules by which a {type(model).__name__} is initialized say nothing of {listed(left)}, which its "
            "constructor gives values: make the model on a real device"
        )


def linked_blocks(module: nn.Module, owner: Any = None) -> Iterator[tuple[nn.Module, Any]]:
    """The outermost entries of module lists that have linked layers, each with the model of transformers that it is in.

    Args:
        owner: the model that `module` is in.
    """
    owner = module if isinstance(module, PreTrainedModel) else owner
    for child in module.children():
        if isinstance(module, nn.ModuleList) and any(isinstance(inner, LinkedLayer) for inner in child.modules()):
            yield child, owner
        else:
            yield from linked_blocks(child, owner)


def _fill(root: nn.Module, owner: PreTrainedModel, device: torch.device, done: set[nn.Module]) -> None:
    """Give values to a module and all in it, but for what is in `done`."""
    linked = []
    for module in _modules(root, done):
        if isinstance(module, LinkedLayer):
            linked.append((module, type(module)))
            _make_plain(module, device)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                real = torch.empty_like(parameter, device=device)
                if real.is_floating_point():
                    real.fill_(math.nan)  # a mark of what gets no value
                module._parameters[name] = nn.Parameter(real, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
    _initialize(root, owner, done)
    for module, kind in linked:
        weight: Any = module._parameters["weight"]
        module.__class__ = kind
        rename_parameter(
            module, "weight", "link_values", nn.Parameter(module.slot_values(weight), weight.requires_grad)
        )


def _make_plain(layer: LinkedLayer, device: torch.device) -> None:
    """For a moment, make a layer the plain one that rules of initialization know."""
    values, shape = layer.link_values, layer.storage.weight_shape
    weight = nn.Parameter(torch.full(shape, math.nan, dtype=values.dtype, device=device), values.requires_grad)
    layer.__class__ = layer.plain  # type: ignore[assignment]
    rename_parameter(layer, "link_values", "weight", weight)


def _initialize(module: nn.Module, owner: PreTrainedModel, done: set[nn.Module]) -> None:
    """As `PreTrainedModel.initialize_weights`: what is inside first, each by the rules of the model that it is in."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    for child in module.children():
        if child not in done:
            _initialize(child, owner, done)
    owner._init_weights(module)


def _modules(module: nn.Module, done: set[nn.Module]) -> Iterator[nn.Module]:
    yield module
    for child in module.children():
        if child not in done:
            yield from _modules(child, done)

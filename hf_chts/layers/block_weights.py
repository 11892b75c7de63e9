"""The dense weights of a block's linked layers, made together before its forward pass.

The layers of a small model compute for less time on a GPU than it takes to launch their kernels from Python. So all
weights of a block are filled by one kernel, and all of its gradients are gathered by another. In between they are
ordinary tensors, which are kept until the backward pass: only where the sparse layers of the whole model are no more
than `dense_mib` when they are dense. Layers that are called under another autocast, or under activation checkpointing
within the block, make their weights themselves.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hf_chts.layers.linked_layer import LinkedLayer, surroundings
from hf_chts.layers.materialize import linked_blocks
from hf_chts.layers.sparse_layer import autocast_dtype


class _Removable(Protocol):
    def remove(self) -> None: ...


def make_together(model: nn.Module) -> list[_Removable]:
    """Have the weights of a small model made block by block. Returns the hooks, to be removed.

    Every rank must hold the values of all links. Before version 2.8 torch does not say whether saved tensors go through
    hooks, so that layers could not tell activation checkpointing; there are no hooks then.
    """
    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        return []
    layers = [module for module in model.modules() if isinstance(module, LinkedLayer)]
    handles: list[_Removable] = []
    weights = sum(prod(layer.storage.shape) for layer in layers)
    if layers and weights * 2 <= layers[0].storage.dense_bytes:
        handles.append(_Traced(layers))
        for block, _ in linked_blocks(model):
            made = _BlockWeights(weights)
            handles += [
                block.register_forward_pre_hook(made.make),
                block.register_forward_hook(_forget, always_call=True),
            ]
    return handles


class _Traced:
    """Lets compilers see how weights are made, and keep them until the backward pass."""

    def __init__(self, layers: Sequence[LinkedLayer]) -> None:
        self.layers = layers
        for layer in layers:
            layer.traced = True

    def remove(self) -> None:
        for layer in self.layers:
            layer.traced = False


class _BlockWeights:
    """Makes the weights of a block.

    Args:
        weights: the number of weights of all sparse layers of the model.
    """

    def __init__(self, weights: int) -> None:
        self.weights = weights
        self._index: tuple[Any, Tensor | None] = (None, None)  # where the slots lie, for links of some versions

    def make(self, block: nn.Module, _: Any) -> None:
        """Give each layer that can use it its weight, before the block's forward pass."""
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        recomputed = block.training and getattr(block, "gradient_checkpointing", False)
        if transformed or recomputed or torch.compiler.is_compiling():
            return
        layers = [layer for layer in block.modules() if isinstance(layer, LinkedLayer) and layer.dense_gradient is None]
        dtype = _made_dtype(layers)
        if dtype is None or self.weights * dtype.itemsize > layers[0].storage.dense_bytes:
            return
        if dtype.itemsize == 2:  # those of odd widths are padded on their own
            layers = [layer for layer in layers if not any(side % 8 for side in layer.storage.shape)]
        if not layers:
            return
        shapes, values = [layer.storage.weight_shape for layer in layers], [layer.link_values for layer in layers]
        here = surroundings(values[0].device.type)
        for layer, weight in zip(layers, _Fill.apply(self._places(layers), shapes, dtype, *values), strict=True):
            layer.__dict__["made"] = (weight, here)

    def _places(self, layers: Sequence[LinkedLayer]) -> Tensor:
        """int64 (slots of all layers,): where the links lie in the weights one after the other.

        A slot without a link has the place behind them all.
        """
        held = [layer.link_positions for layer in layers]
        key = [(one.data_ptr(), one.device, layer.storage.version) for one, layer in zip(held, layers, strict=True)]
        known, index = self._index
        if index is None or known != key:
            sizes = [prod(layer.storage.shape) for layer in layers]
            places, begin = [], 0
            for positions, size in zip(held, sizes, strict=True):
                place = positions.long()
                places.append(torch.where(place < size, place + begin, sum(sizes)))
                begin += size
            index = torch.cat(places)
            self._index = (key, index)
        return index

    def __getstate__(self) -> dict[str, Any]:
        return {"weights": self.weights, "_index": (None, None)}


def _made_dtype(layers: Sequence[LinkedLayer]) -> torch.dtype | None:
    """The dtype of the weights, or None where they are not alike."""
    alike = {(layer.link_values.device, layer.link_values.dtype) for layer in layers}
    if len(alike) != 1:
        return None
    ((device, dtype),) = alike
    return autocast_dtype(device.type) or dtype


def _forget(block: nn.Module, *_: Any) -> None:
    for layer in block.modules():
        layer.__dict__.pop("made", None)


class _Fill(torch.autograd.Function):
    """Dense weights of values: those of several layers, in one piece of memory."""

    @staticmethod
    def forward(
        ctx: Any, index: Tensor, shapes: Sequence[torch.Size], dtype: torch.dtype, *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.index, ctx.slots, ctx.dtype, ctx.shapes = index, [value.numel() for value in values], dtype, shapes
        ctx.set_materialize_grads(False)  # a layer that took no part gets no gradient
        ctx.save_for_backward(*values)  # so that values that have changed since are noticed
        sizes = [shape.numel() for shape in shapes]
        flat = torch.zeros(sum(sizes) + 1, dtype=dtype, device=index.device)
        flat.index_copy_(0, index, torch.cat(values).to(dtype))
        return tuple(part.view(shape) for part, shape in zip(flat[:-1].split(sizes), shapes, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        values = ctx.saved_tensors
        parts = [
            values[0].new_zeros(shape.numel(), dtype=ctx.dtype) if grad is None else grad.reshape(-1)
            for grad, shape in zip(grads, ctx.shapes, strict=True)
        ]
        flat = torch.cat([*parts, parts[0].new_zeros(1)])
        found = flat.index_select(0, ctx.index).to(values[0].dtype).split(ctx.slots)
        return None, None, None, *(None if grad is None else one for grad, one in zip(grads, found, strict=True))

"""Layers that keep a value for each of their links, and no dense weight."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_chts.layers.link_products import fill, product
from hf_chts.layers.slots import SlotStorage
from hf_chts.layers.sparse_layer import SparseLayer, autocast_dtype, rename_parameter
from hf_chts.layers.sparse_products import sparse_product, takes
from hf_chts.layers.weight_parts import Slots

_Layer = TypeVar("_Layer", bound="LinkedLayer")


class LinkedLayer(SparseLayer):
    """A layer whose trained parameter is `link_values`, (slots,): the values of its links; see hf_chts/layers/slots.py.

    `weight` is the dense weight, made anew whenever it is asked for. It can be differentiated, so that models which
    multiply with it past the layer's forward train as well, at the price of keeping it until the backward pass.
    """

    parameter_name = "link_values"
    other_name = "weight"

    link_values: nn.Parameter
    link_positions: Tensor
    storage: SlotStorage
    traced: bool = False  # whether a compiler sees how the weight is made, and may keep it

    @classmethod
    def attach(cls: type[_Layer], layer: nn.Module, topology: Tensor, slots: int, dense_bytes: int) -> _Layer:
        """Turn `layer` itself into a linked layer with the links of `topology`, bool (out, in), and `slots` slots.

        The module stays the same object; its parameter `weight` makes way for `link_values`, so the optimizer has to be
        made after. Where the weight is on the meta device, so are the values, and the positions on the CPU.

        Args:
            dense_bytes: how many bytes of the weight are made dense at a time.
        """
        cls.check(layer)
        weight = layer.get_parameter("weight")
        layer.__class__ = cls
        assert isinstance(layer, cls)
        shape, device = (topology.shape[0], topology.shape[1]), torch.device("cpu") if weight.is_meta else weight.device
        layer.storage = SlotStorage(layer, shape, slots, device, dense_bytes)
        layer.storage.copy(topology)
        values = weight.detach().new_empty(slots) if weight.is_meta else layer.slot_values(weight)
        rename_parameter(layer, "weight", "link_values", nn.Parameter(values, weight.requires_grad))
        return layer

    def slot_values(self, weight: Tensor) -> Tensor:
        """The values of the slots, (slots,), of a dense weight as the plain layer has it."""
        return self.storage.values(self.matrix(weight.detach()))

    def revert(self) -> nn.Module:
        """Turn the layer back into a plain, dense one with the same function."""
        weight = nn.Parameter(self.weight.detach(), self.link_values.requires_grad)
        del self._buffers["link_positions"], self.storage
        self._non_persistent_buffers_set.discard("link_positions")
        for name in ("dense_gradient", "traced", "made"):
            self.__dict__.pop(name, None)
        self.__class__ = self.plain  # type: ignore[assignment]
        rename_parameter(self, "link_values", "weight", weight)
        return self

    @property
    def parameter(self) -> Tensor:
        return self.link_values

    @property
    def weight(self) -> Tensor:
        """The dense weight, as the plain layer has it."""
        weight = fill(self.link_values, self._slots())
        if self.dense_gradient is not None and weight.requires_grad:
            weight.register_hook(self.dense_gradient.add_)
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # of a model's own kind of linear layer, which reads the weight
        return self.plain.forward(self, *args, **kwargs)

    def _product(self, x: Tensor, plain: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        # transforms batch and differentiate torch's own functions, in either mode and any number of times
        bias: Any = self.bias
        made = self._made(x)
        if made is not None:
            return plain(x, made, bias)
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return plain(x, self.weight, bias)
        index = self.storage.index
        if index is not None and self.dense_gradient is None and takes(x):
            return sparse_product(x, self.link_values, bias, index)
        return product(x, self.link_values, self._slots(), bias, self.dense_gradient)

    def _made(self, x: Tensor) -> Tensor | None:
        """The dense weight of this forward pass in a small model on a GPU; see block_weights.py."""
        if not torch.compiler.is_compiling():
            weight, there = self.__dict__.get("made", (None, None))
            return weight if weight is not None and surroundings(x.device.type) == there else None
        if not self.traced or self.dense_gradient is not None:
            return None
        values: Tensor = self.link_values
        dtype = autocast_dtype(x.device.type)
        if dtype is not None:
            values = values.to(dtype)
        return fill(values, self._slots())

    def __getstate__(self) -> dict[str, Any]:
        # without the weight of a forward pass, whose graph cannot be copied
        return {name: value for name, value in self.__dict__.items() if name != "made"}

    def _slots(self) -> Slots:
        # a replica of nn.DataParallel has its own buffers, and the storage of the layer that it is made from
        return self.storage.slots(self.link_positions, self.link_values.element_size())


class LinkedLinear(LinkedLayer, nn.Linear):  # type: ignore[override] # nobody can set the weight
    """`nn.Linear` without its weight; see `LinkedLayer`."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return self._product(input, functional.linear)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, links={self.links}"


class LinkedConv1D(LinkedLayer, Conv1D):
    """transformers' `Conv1D` without its weight; see `LinkedLayer`."""

    plain = Conv1D
    transposed = True

    def forward(self, input: Tensor) -> Tensor:
        return self._product(input, _conv1d)

    def __repr__(self) -> str:
        return f"LinkedConv1D(nf={self.nf}, nx={self.nx}, links={self.links})"


def surroundings(kind: str) -> tuple[Any, ...]:
    """What decides how a product on this kind of device is computed, and whether it is computed again.

    Activation checkpointing switches gradients off, or has saved tensors go through hooks of its own.
    """
    return torch.is_grad_enabled(), autocast_dtype(kind), torch._C._autograd._top_saved_tensors_default_hooks(True)


def _conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.addmm(cast(Tensor, bias), x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


def linked_class(layer: nn.Module) -> type[LinkedLayer]:
    """The linked class that a layer of `PLAIN_LAYERS`, or of a subclass of one, becomes."""
    return _linked_class(type(layer))


def _linked_class(kind: type[nn.Module]) -> type[LinkedLayer]:
    base: type[LinkedLayer] = LinkedConv1D if issubclass(kind, Conv1D) else LinkedLinear
    if kind is base.plain:
        return base
    if kind not in _MADE:
        _MADE[kind] = type(f"Linked{kind.__name__}", (_OfSubclass, base, kind), {"plain": kind})
    return _MADE[kind]


_MADE: dict[type[nn.Module], type[LinkedLayer]] = {}


class _OfSubclass(LinkedLayer):
    """What a linked layer has that is made of a model's own kind of linear layer: that kind's forward."""

    def __reduce_ex__(self, protocol: Any) -> Any:  # its class is in no module
        return _empty, (self.plain,), self.__getstate__()


def _empty(kind: type[nn.Module]) -> LinkedLayer:
    made = _linked_class(kind)
    return made.__new__(made)

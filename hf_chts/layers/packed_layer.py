"""Layers for inference that keep nothing but their links, packed: values of 16 or 32 bits, and where they are.

    lanes      (lanes.py)      on a CPU
    row links  (row_links.py)  on other devices

Moved to another device, a layer is packed anew.
"""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_chts.layers.lanes import Lanes, arrange
from hf_chts.layers.packed_products import Links, packed_products
from hf_chts.layers.row_links import RowLinks
from hf_chts.layers.shared_inputs import multiply
from hf_chts.layers.sparse_layer import autocast_dtype, rename_parameter

_Layer = TypeVar("_Layer", bound="PackedLayer")
_LAYOUTS: tuple[type[Links], ...] = (Lanes, RowLinks)


class PackedLayer(nn.Module):
    """A layer whose links are packed. The tensors of the layout are its buffers, `packed_values` among them.

    Attributes:
        shape: (out, in).
        links: the number of links.
        plain: the class that the layer is made from.
        transposed: whether the plain layer's weight lies as (in, out).
    """

    plain: ClassVar[type[nn.Module]]
    transposed: ClassVar[bool] = False

    bias: nn.Parameter | None
    packed_values: Tensor
    shape: tuple[int, int]
    links: int

    @classmethod
    def attach(cls: type[_Layer], layer: nn.Module, links: int) -> _Layer:
        """Turn `layer` itself into a packed one that waits for the values of its links, and then for `pack`.

        Until then they are the parameter `packed_values`, (links,), as the weight was: on the meta device, if it was.
        """
        weight = layer.get_parameter("weight")
        layer.__class__ = cls
        assert isinstance(layer, cls)
        rows, columns = weight.shape
        layer.shape, layer.links = (columns, rows) if cls.transposed else (rows, columns), links
        values = nn.Parameter(weight.detach().new_empty(links), requires_grad=False)
        rename_parameter(layer, "weight", "packed_values", values)
        return layer

    @torch.no_grad()
    def pack(self, mask: Tensor, values: Tensor) -> None:
        """Take over the links of a weight.

        Args:
            mask: bool, in the layout of the plain layer's weight.
            values: (links,), by ascending position in that layout.
        """
        rows, columns = mask.cpu().nonzero(as_tuple=True)
        found = values.detach()
        if self.transposed:
            order = columns.argsort(stable=True)
            rows, columns, found = columns[order], rows[order], found[order.to(found.device)]
        self._parameters.pop("packed_values", None)
        self._take(_packed(rows, columns, found, self.shape))

    @property
    def packed(self) -> Links:
        """What the buffers hold."""
        found: Links | None = self.__dict__.get("found")
        if found is None or found.values is not self._buffers["packed_values"]:
            layout: Any = Lanes if "packed_gaps" in self._buffers else RowLinks
            found = layout(*(self._buffers[f"packed_{name}"] for name in layout.NAMES), self.shape)
            if not torch.compiler.is_compiling():
                self.__dict__["found"] = found
        assert found is not None
        return found

    @property
    def weight(self) -> Tensor:
        """The dense weight as the plain layer has it, made anew whenever it is asked for.

        While the layer waits for its values, as when a model gives the weights that it did not find new numbers, this
        is a tensor without any.
        """
        waits = "packed_values" in self._parameters
        weight = torch.empty(self.shape, device="meta") if waits else self.packed.dense()
        return weight.t() if self.transposed else weight

    def train(self: _Layer, mode: bool = True) -> _Layer:
        if mode:
            raise ValueError(
                "this model is packed for inference and cannot be trained: load it with load_sparse(directory), "
                "without compute='sparse', to train it"
            )
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("found", "group")}

    def _product(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.shape[1]:
            raise RuntimeError(f"a layer with {self.shape[1]} inputs got {x.shape[-1]} in a tensor {tuple(x.shape)}")
        if not x.is_floating_point():
            raise RuntimeError(f"a layer multiplies floating point numbers, got a tensor of {x.dtype}")
        dtype = autocast_dtype(x.device.type)
        given = x if dtype is None else x.to(dtype)
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            weight = self.packed.dense().to(given.dtype)
            return functional.linear(given, weight, None if self.bias is None else self.bias.to(given.dtype))
        # for whoever takes operators apart
        seen = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0
        if seen or (torch.is_grad_enabled() and given.requires_grad):
            packed = self.packed
            bias = [] if self.bias is None else [self.bias]
            return packed_products(given, list(packed.tensors), [self.shape[0]], self.shape[1], bias)[0]
        return multiply(self, x, given)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if "packed_values" in self._buffers:
            packed = self.packed
            if not packed.values.is_meta and isinstance(packed, Lanes) != (packed.values.device.type == "cpu"):
                self._take(_packed(*_sorted(packed), self.shape))
        return self

    def _take(self, packed: Links) -> None:
        for layout in _LAYOUTS:
            for name in layout.NAMES:
                self._buffers.pop(f"packed_{name}", None)
        for name, tensor in zip(packed.NAMES, packed.tensors, strict=True):
            self.register_buffer(f"packed_{name}", tensor)


def _packed(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Links:
    """In the layout of the device of `values`."""
    if values.device.type == "cpu":
        return arrange(rows.cpu(), columns.cpu(), values, shape)
    return RowLinks.of(rows.to(values.device), columns.to(values.device), values, shape)


def _sorted(packed: Links) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of all that is not 0, by row and column."""
    rows, columns = packed.places()
    values = packed.values.reshape(-1)
    kept = (rows >= 0) & (values != 0)
    rows, columns, values = rows[kept], columns[kept], values[kept]
    order = (rows * packed.shape[1] + columns).argsort()
    return rows[order], columns[order], values[order]


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[override,misc] # nobody can set the weight
    """`nn.Linear` for inference; see `PackedLayer`."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return self._product(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, links={self.links}"


class PackedConv1D(PackedLayer, Conv1D):
    """transformers' `Conv1D` for inference; see `PackedLayer`."""

    plain = Conv1D
    transposed = True

    def forward(self, input: Tensor) -> Tensor:
        return self._product(input)

    def __repr__(self) -> str:
        return f"PackedConv1D(nf={self.nf}, nx={self.nx}, links={self.links})"


class _OfSubclass(PackedLayer):
    """Has the forward of the model's own kind of linear layer that it is made of, which reads the weight."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:  # its class is in no module
        return _empty, (self.plain,), self.__getstate__()


_MADE: dict[type[nn.Module], type[PackedLayer]] = {}


def packed_class(kind: type[nn.Module]) -> type[PackedLayer]:
    """The packed class that a layer of this class, `nn.Linear`, `Conv1D` or a subclass of one, becomes."""
    base: type[PackedLayer] = PackedConv1D if issubclass(kind, Conv1D) else PackedLinear
    if kind is base.plain:
        return base
    if kind not in _MADE:
        _MADE[kind] = cast(
            type[PackedLayer], type(f"Packed{kind.__name__}", (_OfSubclass, base, kind), {"plain": kind})
        )
    return _MADE[kind]


def _empty(kind: type[nn.Module]) -> PackedLayer:
    made = packed_class(kind)
    return made.__new__(made)

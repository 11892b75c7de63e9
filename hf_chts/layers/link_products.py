"""The products of a layer that keeps a value for each of its links, and no dense weight.

The dense weight is made just before it is used and dropped right after, once for the forward pass and once for the
backward pass; so is its dense gradient. All that outlives a product is in proportion to the links.

A weight has the layout of the plain layer: (out, in), or (in, out) for Conv1D, called (rows, columns) here. Its links
lie in slots, in no order: `positions` has the place of each in the flattened weight, and rows · columns for a slot
without a link.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_chts.layers.sparse_layer import Accumulator

_kept = threading.local()


@dataclass(frozen=True)
class Slots:
    """Where the slots of a layer lie in its weight.

    Attributes:
        positions: integer (slots,), see above.
        shape: (rows, columns) of the weight.
        transposed: whether the weight is (in, out).
        order: the slots by ascending position, integer (slots,), for a weight that is worked through in blocks of rows;
            None: it is made whole.
        block: the number of rows of a block.
    """

    positions: Tensor
    shape: tuple[int, int]
    transposed: bool = False
    order: Tensor | None = None
    block: int = 0

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


def fill(values: Tensor, slots: Slots) -> Tensor:
    """The dense weight (rows, columns); it can be differentiated by `values`, (slots,), any number of times."""
    dense = values.new_zeros(slots.numel + 1).index_copy(0, slots.positions.long(), values)
    return dense[: slots.numel].view(slots.shape)


def product(
    x: Tensor, values: Tensor, slots: Slots, bias: Tensor | None = None, dense_gradient: Accumulator | None = None
) -> Tensor:
    """x · weight (+ bias), and its gradients, bit for bit as with a dense weight that is not made in blocks.

    Args:
        x: (…, in).
        values: (slots,); under autocast it is cast as a weight would be.
        bias: (out,).
        dense_gradient: gets the dense gradient of the weight in the backward pass.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, bias = x.to(dtype), bias if bias is None else bias.to(dtype)
    if torch.compiler.is_compiling() and dense_gradient is None:
        return _compiled(x, values, slots.positions, bias, slots.order, *slots.shape, slots.transposed, slots.block)
    return _eager(x, values, bias, slots, dense_gradient)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, slots: Slots, dense_gradient: Accumulator | None
    ) -> Tensor:
        # the parameter itself, and not a view: engines that split it put the gathered one in its place
        ctx.save_for_backward(x, values, slots.positions)
        ctx.slots, ctx.dense_gradient = slots, dense_gradient
        result = _multiply(x, values, bias, slots)
        # not a view, as what a linear layer returns is none: models may write into it
        return torch.ops.aten._unsafe_view(result, result.shape) if result._is_view() else result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, values, _ = ctx.saved_tensors
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        differentiate = _differentiable if torch.is_grad_enabled() else _gradients
        of_x, of_values = differentiate(grad, x, values, ctx.slots, ctx.needs_input_grad[:2], ctx.dense_gradient)
        return of_x, of_values, of_bias, None, None


# an accumulator is an object of Python's, which no graph can hold: a compiled model runs the steps that have one so
_eager = torch.compiler.disable(_Product.apply)


def _multiply(x: Tensor, values: Tensor, bias: Tensor | None, slots: Slots) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        if slots.order is None:
            (part,) = _parts(slots)
            weight = part.fill(values, x.dtype)
            if not slots.transposed:
                return functional.linear(x, weight, bias)
            rows = x.reshape(-1, x.shape[-1])
            product = torch.addmm(bias, rows, weight) if bias is not None else rows.mm(weight)
            return product.view(*x.shape[:-1], slots.shape[1])
        rows = x.reshape(-1, x.shape[-1])
        result = x.new_zeros(len(rows), slots.shape[slots.transposed])
        for part in _parts(slots):
            weight = part.fill(values, x.dtype)
            if slots.transposed:
                result.addmm_(rows[:, part.rows], weight)
            else:
                torch.mm(rows, weight.t(), out=result[:, part.rows])
        if bias is not None:
            result += bias
        return result.view(*x.shape[:-1], -1)


def _gradients(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    slots: Slots,
    needs: Sequence[bool] = (True, True),
    dense_gradient: Accumulator | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by x and values, those that are needed, from that of the product."""
    inputs, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    of_x = of_values = whole = None
    if needs[0]:
        of_x = torch.zeros_like(inputs) if slots.order is not None else torch.empty_like(inputs)
    if needs[1]:
        of_values = torch.zeros_like(values) if slots.order is not None else torch.empty_like(values)
    if dense_gradient is not None:
        whole = x.new_empty(slots.shape)
    with torch.autocast(x.device.type, enabled=False):
        for part in _parts(slots):
            if of_x is not None:
                weight = part.fill(values, x.dtype)
                if slots.transposed:
                    torch.mm(grads, weight.t(), out=of_x[:, part.rows])
                elif slots.order is None:
                    torch.mm(grads, weight, out=of_x)
                else:
                    of_x.addmm_(grads[:, part.rows], weight)
            if of_values is not None or whole is not None:
                left, right = (inputs, grads) if slots.transposed else (grads, inputs)
                gradient = part.buffer(x.dtype, x.device)
                torch.mm(left[:, part.rows].t(), right, out=gradient)
                if of_values is not None:
                    part.gather(of_values, gradient)
                if whole is not None:
                    whole[part.rows] = gradient
    if dense_gradient is not None and whole is not None:
        dense_gradient.add_(whole)
    return None if of_x is None else of_x.view(x.shape), of_values


def _differentiable(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    slots: Slots,
    needs: Sequence[bool],
    dense_gradient: Accumulator | None,
) -> tuple[Tensor | None, Tensor | None]:
    """As `_gradients`, for whoever differentiates the gradients again."""
    weight = fill(values.to(x.dtype), slots)
    weight = weight.t() if slots.transposed else weight  # (out, in)
    inputs, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    gradient = inputs.t() @ grads if slots.transposed else grads.t() @ inputs
    if dense_gradient is not None:
        dense_gradient.add_(gradient.detach())
    padded = torch.cat([gradient.reshape(-1), gradient.new_zeros(1)])
    return (grads @ weight).view(x.shape), padded[slots.positions.long()].to(values.dtype)


@dataclass(frozen=True)
class _Part:
    """Some rows of a weight, made at a time: all of them, or a block.

    Attributes:
        rows: which.
        columns: of the weight.
        index: int64, the places of the links in the flattened part; rows · columns for a slot without a link.
        chosen: the slots that `index` is of; None: all.
    """

    rows: slice
    columns: int
    index: Tensor
    chosen: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns

    def fill(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        dense = _buffer(self.shape[0] * self.columns + 1, dtype, values.device).zero_()
        values = values.detach() if self.chosen is None else values.detach()[self.chosen]
        dense.index_copy_(0, self.index, values.to(dtype))
        return dense[:-1].view(self.shape)

    def buffer(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A matrix of the part's shape to write a gradient into; it takes the place of what `fill` made."""
        dense = _buffer(self.shape[0] * self.columns + 1, dtype, device)
        dense[-1] = 0  # what slots without a link get
        return dense[:-1].view(self.shape)

    def gather(self, into: Tensor, gradient: Tensor) -> None:
        """Write the values of the links, of a matrix that `buffer` gave, into their slots."""
        flat = gradient.as_strided((gradient.numel() + 1,), (1,))
        found = flat.take(self.index).to(into.dtype)
        if self.chosen is None:
            into.copy_(found)
        else:
            into[self.chosen] = found


def _parts(slots: Slots) -> Iterator[_Part]:
    rows, columns = slots.shape
    if slots.order is None:
        yield _Part(slice(0, rows), columns, slots.positions.long(), None)
        return
    order = slots.order.long()
    ordered = slots.positions.long()[order]
    starts = torch.arange(0, rows + slots.block, slots.block, device=ordered.device).clamp_(max=rows)
    bounds = torch.searchsorted(ordered, starts * columns).tolist()
    for (start, stop), (first, last) in zip(pairwise(starts.tolist()), pairwise(bounds), strict=True):
        yield _Part(slice(start, stop), columns, ordered[first:last] - start * columns, order[first:last])


def _buffer(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for one product, flat; the next product of this thread writes over it.

    A CPU maps fresh memory for every large tensor page by page, which takes longer than to fill it (2048 x 5461 fp32:
    9 ms against 2), so each thread keeps what its largest layer needs. A GPU's allocator keeps it itself.
    """
    if device.type != "cpu":
        return torch.empty(numel, dtype=dtype, device=device)
    kept: dict[Any, Tensor] = _kept.__dict__
    if dtype not in kept or kept[dtype].numel() < numel:
        kept.pop(dtype, None)
        kept[dtype] = torch.empty(numel, dtype=dtype)
    return kept[dtype][:numel]


# For compiled and exported models: two operators that a compiler takes as they are. Traced through, it would keep the
# dense weight of every layer for the backward pass.


@torch.library.custom_op("hf_chts::linked_product", mutates_args=())
def _compiled(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    rows: int,
    columns: int,
    transposed: bool,
    block: int,
) -> Tensor:
    return _multiply(x, values, bias, Slots(positions, (rows, columns), transposed, order, block))


@torch.library.custom_op("hf_chts::linked_product_gradients", mutates_args=())
def _compiled_gradients(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    order: Tensor | None,
    rows: int,
    columns: int,
    transposed: bool,
    block: int,
) -> tuple[Tensor, Tensor]:
    of_x, of_values = _gradients(grad, x, values, Slots(positions, (rows, columns), transposed, order, block))
    assert of_x is not None
    assert of_values is not None
    return of_x, of_values


@_compiled.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    *_, rows, columns, transposed, _ = others
    return x.new_empty(*x.shape[:-1], columns if transposed else rows)


@_compiled_gradients.register_fake
def _(grad: Tensor, x: Tensor, values: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(values)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, positions, bias, order, *ctx.facts = inputs
    ctx.save_for_backward(x, values, positions, order)
    ctx.has_bias = bias is not None


def _compiled_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, positions, order = ctx.saved_tensors
    of_x, of_values = _compiled_gradients(grad, x, values, positions, order, *ctx.facts)
    of_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias else None
    return of_x, of_values, None, of_bias, None, None, None, None, None


_compiled.register_autograd(_compiled_backward, setup_context=_save)

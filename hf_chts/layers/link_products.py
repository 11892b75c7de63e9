"""The products of a layer that keeps a value for each of its links, and no dense weight.

The dense weight is made just before it is used and dropped right after, once for the forward pass and once for the
backward pass; so is its dense gradient. All that outlives a product is in proportion to the links.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_chts.layers.sparse_layer import Accumulator, autocast_dtype
from hf_chts.layers.weight_parts import Slots, parts


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
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
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
        differentiate = _differentiable if torch.is_grad_enabled() else gradients
        of_x, of_values = differentiate(grad, x, values, ctx.slots, ctx.needs_input_grad[:2], ctx.dense_gradient)
        return of_x, of_values, of_bias, None, None


# an accumulator is an object of Python's, which no graph can hold: a compiled model runs the steps that have one so
_eager = torch.compiler.disable(_Product.apply)


def _multiply(x: Tensor, values: Tensor, bias: Tensor | None, slots: Slots) -> Tensor:
    # operands have one dtype, so autocast, which may be on, has nothing to cast
    *others, _ = x.shape
    shape = slots.padded(x)
    width, out = shape[not slots.transposed], slots.shape[slots.transposed]
    x, bias = _widened(x, width), _widened(bias, shape[slots.transposed])
    if slots.order is None:
        (part,) = parts(slots, x)
        weight = part.fill(values, x.dtype)
        if not slots.transposed:
            return _narrowed(functional.linear(x, weight, bias), out)
        rows = x.reshape(-1, width)
        product = torch.addmm(bias, rows, weight) if bias is not None else rows.mm(weight)
        return _narrowed(product.view(*others, -1), out)
    rows = x.reshape(-1, width)
    result = x.new_zeros(len(rows), out)
    for part in parts(slots, x):
        weight = part.fill(values, x.dtype)
        if slots.transposed:
            result.addmm_(rows[:, part.rows], weight)
        else:
            torch.mm(rows, weight.t(), out=result[:, part.rows])
    if bias is not None:
        result += bias
    return result.view(*others, out)


def gradients(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    slots: Slots,
    needs: Sequence[bool] = (True, True),
    dense_gradient: Accumulator | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by x and values, those that are needed, from that of the product."""
    shape = slots.padded(x)
    inputs = _widened(x.reshape(-1, x.shape[-1]), shape[not slots.transposed])
    grads = _widened(grad.reshape(-1, grad.shape[-1]), shape[slots.transposed])
    of_x = of_values = whole = None
    if needs[0]:
        of_x = inputs.new_zeros(inputs.shape) if slots.order is not None else inputs.new_empty(inputs.shape)
    if needs[1]:
        of_values = torch.zeros_like(values) if slots.order is not None else torch.empty_like(values)
    if dense_gradient is not None:
        whole = x.new_empty(shape)
    for part in parts(slots, x):
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
        dense_gradient.add_(whole[: slots.shape[0], : slots.shape[1]])
    return None if of_x is None else _narrowed(of_x, x.shape[-1]).view(x.shape), of_values


def _widened(tensor: Any, width: int) -> Any:
    """With zeros added to its last dimension, up to `width` elements."""
    if tensor is None or tensor.shape[-1] == width:
        return tensor
    return functional.pad(tensor, (0, width - tensor.shape[-1]))


def _narrowed(tensor: Tensor, width: int) -> Tensor:
    """The first `width` elements of its last dimension; contiguous, as models expect it of a linear layer."""
    return tensor if tensor.shape[-1] == width else tensor[..., :width].contiguous()


def _differentiable(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    slots: Slots,
    needs: Sequence[bool],
    dense_gradient: Accumulator | None,
) -> tuple[Tensor | None, Tensor | None]:
    """As `gradients`, for whoever differentiates the gradients again."""
    weight = fill(values.to(x.dtype), slots)
    weight = weight.t() if slots.transposed else weight  # (out, in)
    inputs, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    gradient = inputs.t() @ grads if slots.transposed else grads.t() @ inputs
    if dense_gradient is not None:
        dense_gradient.add_(gradient.detach())
    padded = torch.cat([gradient.reshape(-1), gradient.new_zeros(1)])
    return (grads @ weight).view(x.shape), padded[slots.positions.long()].to(values.dtype)


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
    of_x, of_values = gradients(grad, x, values, Slots(positions, (rows, columns), transposed, order, block))
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

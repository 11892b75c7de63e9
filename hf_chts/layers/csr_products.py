"""compute: sparse without numba: torch's CSR products, which are seldom faster than dense ones."""

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from hf_chts.layers.link_index import Direction, LinkIndex
from hf_chts.layers.link_products import gradients
from hf_chts.layers.weight_parts import Slots

_log = logging.getLogger(__name__)


@functools.cache
def _say() -> None:
    _log.warning(
        "compute: sparse runs without numba, by torch's own sparse products, which are slower than dense ones up to "
        'high sparsity: pip install "hf_chts[cpu]"'
    )


def csr_product(x: Tensor, values: Tensor, bias: Tensor | None, index: LinkIndex) -> Tensor:
    """x · weight (+ bias), as `sparse_products.sparse_product`."""
    return _uncompiled(x, values, bias, index)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, index: LinkIndex) -> Tensor:
        ctx.save_for_backward(x, values, index.forward.starts)
        ctx.index = index
        product = _multiply(x.reshape(-1, x.shape[-1]), values, index.forward)
        if bias is not None:
            product += bias
        return product.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, values, _ = ctx.saved_tensors
        flat, needs, index = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad, ctx.index
        of_x = _multiply(flat, values, index.backward).view(x.shape) if needs[0] else None
        of_values = None
        if needs[1]:
            links, (rows, columns) = index.forward, index.forward.shape
            positions = torch.full_like(links.slots, rows * columns, dtype=torch.int64)
            positions[links.slots[: links.count].long()] = links.positions()
            _, of_values = gradients(grad, x, values, Slots(positions, (rows, columns)), (False, True))
        return of_x, of_values, flat.sum(0) if needs[2] else None, None


@torch.compiler.disable
def _uncompiled(*arguments: Any) -> Tensor:
    _say()
    return _Product.apply(*arguments)


def _multiply(x: Tensor, values: Tensor, links: Direction) -> Tensor:
    """x (tokens, columns) times the links: (tokens, rows)."""
    count = links.count
    chosen = values.detach()[links.slots[:count].long()].to(x.dtype)
    weight = torch.sparse_csr_tensor(links.starts, links.column_numbers(), chosen, links.shape, check_invariants=False)
    return (weight @ x.t()).t().contiguous()

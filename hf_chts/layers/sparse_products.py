"""Products of a layer with its links alone, and their gradients: compute: sparse.

The forward pass multiplies each link's value with a tile of tokens (tiles.py); the backward pass does the same with the
transposed links for the gradient of the input, and for the links' own gradient takes one dot product for each of them.
Neither makes anything of the size of the weight. Sums are in float32, in an order that no number of threads changes.
"""

from typing import Any

import torch
from torch import Tensor

from hf_chts.layers.csr_products import csr_product
from hf_chts.layers.link_index import Direction, LinkIndex
from hf_chts.layers.sparse_layer import autocast_dtype
from hf_chts.layers.tiles import cut_tokens, shared_tiles, tile_width, uncut_tokens
from hf_chts.layers.weight_parts import kept_buffer

DTYPES = (torch.float32, torch.bfloat16)
_TENSORS = (Tensor, torch.nn.Parameter)
_PIECES = 2048  # bytes of each thread, for pieces that are no 16 by 16
_STEP = 1 << 15  # links that a thread gathers at a time
_FEW = 1 << 18  # multiplications that are not worth a second thread


def takes(x: Tensor) -> bool:
    """Whether x can be multiplied with links alone: float32 or bfloat16 on the CPU, under autocast too."""
    return x.device.type == "cpu" and _dtype(x) in DTYPES and x.numel() > 0


def _dtype(x: Tensor) -> torch.dtype:
    return autocast_dtype("cpu") or x.dtype


def sparse_product(x: Tensor, values: Tensor, bias: Tensor | None, index: LinkIndex) -> Tensor:
    """x · weight (+ bias), and its gradients, from the links alone.

    Args:
        x: (…, in), float32 or bfloat16 on the CPU.
        values: (slots,).
        bias: (out,).

    Returns:
        (…, out), of the dtype of x, or that of autocast.

    Raises:
        RuntimeError: x has another number of features than the layer.
    """
    outputs, inputs = index.forward.shape
    if x.shape[-1] != inputs:
        raise RuntimeError(f"a layer with {inputs} inputs got {x.shape[-1]} in a tensor {tuple(x.shape)}")
    dtype = _dtype(x)
    bias = bias if bias is None else bias.to(dtype)
    if index.by_torch:
        return csr_product(x.to(dtype), values, bias, index)
    seen = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0
    if seen or type(x) not in _TENSORS:
        # whoever traces, counts or replaces operators is to see ours
        both = (*index.forward.tensors, *index.backward.tensors)
        blocks = (index.forward.block, index.backward.block)
        flat = x.to(dtype).reshape(-1, inputs)
        tokens = flat.shape[0]  # of a size that is not fixed, torch.Size.numel() would make one that is
        out = _multiply_op(_cut_op(flat), values, bias, *both, outputs, inputs, *blocks, tokens)
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], outputs))
    return _Multiply.apply(shared_tiles(x, dtype), values, bias, index, x.shape[:-1])


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tiles: Tensor, values: Tensor, bias: Tensor | None, index: LinkIndex, shape: torch.Size
    ) -> Tensor:
        ctx.save_for_backward(tiles, values, index.forward.starts)
        ctx.index = index
        result = into_tokens(tiles, values, bias, index.forward, shape.numel())
        # not a view, as what a linear layer returns is none: models may write into it
        return torch.ops.aten._unsafe_view(result, (*shape, result.shape[1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "products with the links alone are differentiated once: set compute: dense for gradients of gradients"
            )
        tiles, values, _ = ctx.saved_tensors
        needs, index = ctx.needs_input_grad, ctx.index
        flat = grad.reshape(-1, grad.shape[-1])
        of_tiles = of_values = None
        if needs[0] or needs[1]:
            cut = cut_tokens(flat.to(tiles.dtype))
            if needs[0]:
                of_tiles = into_tiles(cut, values, index.backward)
            if needs[1]:
                of_values = sampled(tiles, cut, values, index.forward)
        return of_tiles, of_values, flat.sum(0) if needs[2] else None, None, None


def into_tokens(tiles: Tensor, values: Tensor, bias: Tensor | None, links: Direction, tokens: int) -> Tensor:
    """The links times tiles, and a bias: (tokens, rows)."""
    out = tiles.new_empty(tokens, links.shape[0])
    if bias is not None:
        bias = bias.detach().float().contiguous()
        if len(bias) % 16:  # it is read 16 numbers at a time
            bias = torch.nn.functional.pad(bias, (0, -len(bias) % 16))
    _multiply(tiles, values, links, out, tokens, bias)
    return out


def into_tiles(tiles: Tensor, values: Tensor, links: Direction) -> Tensor:
    """The links times tiles: (tiles, rows, width)."""
    out = tiles.new_empty(len(tiles), links.shape[0], tiles.shape[2])
    _multiply(tiles, values, links, out, 0, None)
    return out


def _multiply(tiles: Tensor, values: Tensor, links: Direction, out: Tensor, tokens: int, bias: Tensor | None) -> None:
    from hf_chts.kernels import link_loops, threads  # late: imports numba

    count, features, width = tiles.shape
    rows, half = links.shape[0], tiles.dtype == torch.bfloat16
    team = _team(len(values) * count * width)
    groups = 1 if count >= 4 * team or team == 1 else -(-4 * team // count)
    group = max(16, -(-rows // groups // 16) * 16)
    strip = 16 if links.blocks == 1 else group
    each = _PIECES + 4 * strip * width
    room = kept_buffer(len(values) + team * each // 4, torch.float32, tiles.device)
    ordered, scratch = room.data_ptr() + team * each, room.data_ptr()
    _gather(values.to(tiles.dtype), links, ordered, team)
    threads.run(
        link_loops.multiply(width, half, links.columns.dtype == torch.int16),
        count * -(-rows // group),
        *(tiles.data_ptr(), features, links.columns.data_ptr(), ordered, links.starts.data_ptr(), links.blocks, rows),
        *(group, strip, scratch, each, out.data_ptr(), int(out.dim() == 3), tokens),
        0 if bias is None else bias.data_ptr(),
        threads=team,
    )


def sampled(tiles: Tensor, gradients: Tensor, values: Tensor, links: Direction) -> Tensor:
    """For each link, the sum over tokens of its row of `gradients` times its column of `tiles`: like `values`."""
    from hf_chts.kernels import link_loops, threads  # late: imports numba

    count, features, width = tiles.shape
    rows = links.shape[0]
    team = _team(len(values) * count * width)
    band = max(1, -(-rows // (2 * team))) if team > 1 else rows
    found = kept_buffer(len(values), torch.float32, tiles.device)
    threads.run(
        link_loops.sample_links(width, tiles.dtype == torch.bfloat16, links.columns.dtype == torch.int16),
        links.blocks * -(-rows // band),
        *(tiles.data_ptr(), features, links.columns.data_ptr(), links.starts.data_ptr(), links.blocks, rows),
        *(gradients.data_ptr(), count, found.data_ptr(), band),
        threads=team,
    )
    of_values = torch.zeros_like(values, dtype=values.dtype if values.dtype in DTYPES else torch.float32)
    threads.run(
        link_loops.scatter(of_values.dtype == torch.bfloat16),
        -(-len(values) // _STEP),
        *(found.data_ptr(), links.slots.data_ptr(), _count(links), of_values.data_ptr(), _STEP),
        threads=team,
    )
    return of_values.to(values.dtype)


def _gather(values: Tensor, links: Direction, into: int, team: int) -> None:
    from hf_chts.kernels import link_loops, threads  # late: imports numba

    values = values.detach().contiguous()
    threads.run(
        link_loops.gather(values.dtype == torch.bfloat16),
        -(-len(values) // _STEP),
        *(values.data_ptr(), links.slots.data_ptr(), _count(links), into, _STEP),
        threads=team,
    )


def _count(links: Direction) -> int:
    """The address of the number of links."""
    return links.starts.data_ptr() + 8 * (len(links.starts) - 1)


def _team(work: int) -> int:
    return 1 if work < _FEW else torch.get_num_threads()


@torch.library.custom_op("hf_chts::cut_tokens", mutates_args=())
def _cut_op(x: Tensor) -> Tensor:
    return cut_tokens(x)


@_cut_op.register_fake
def _(x: Tensor) -> Tensor:
    width = tile_width(x.shape[0])
    return x.new_empty(-(-x.shape[0] // width), x.shape[1], width)


@torch.library.custom_op("hf_chts::uncut_tokens", mutates_args=())
def _uncut_op(tiles: Tensor, tokens: int) -> Tensor:
    return uncut_tokens(tiles, tokens)


@_uncut_op.register_fake
def _(tiles: Tensor, tokens: int) -> Tensor:
    return tiles.new_empty(tokens, tiles.shape[1])


def _save_tokens(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.tokens = inputs[0].shape[0]


_cut_op.register_autograd(lambda ctx, grad: _uncut_op(grad, ctx.tokens), setup_context=_save_tokens)


@torch.library.custom_op("hf_chts::multiply_links", mutates_args=())
def _multiply_op(
    tiles: Tensor,
    values: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    slots: Tensor,
    starts: Tensor,
    rows: Tensor,
    row_slots: Tensor,
    row_starts: Tensor,
    outputs: int,
    inputs: int,
    block: int,
    row_block: int,
    tokens: int,
) -> Tensor:
    return into_tokens(tiles, values, bias, Direction(columns, slots, starts, (outputs, inputs), block), tokens)


@_multiply_op.register_fake
def _(tiles: Tensor, *others: Any) -> Tensor:
    outputs, *_, tokens = others[8:]
    return tiles.new_empty(tokens, outputs)


@torch.library.custom_op("hf_chts::link_gradients", mutates_args=())
def _gradients_op(
    grad: Tensor,
    tiles: Tensor,
    values: Tensor,
    columns: Tensor,
    slots: Tensor,
    starts: Tensor,
    rows: Tensor,
    row_slots: Tensor,
    row_starts: Tensor,
    outputs: int,
    inputs: int,
    block: int,
    row_block: int,
) -> tuple[Tensor, Tensor]:
    cut = cut_tokens(grad.to(tiles.dtype))
    of_tiles = into_tiles(cut, values, Direction(rows, row_slots, row_starts, (inputs, outputs), row_block))
    return of_tiles, sampled(tiles, cut, values, Direction(columns, slots, starts, (outputs, inputs), block))


@_gradients_op.register_fake
def _(grad: Tensor, tiles: Tensor, values: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tiles), torch.empty_like(values)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tiles, values, bias, *index, outputs, in_features, block, row_block, _ = inputs
    ctx.save_for_backward(tiles, values, *index)
    ctx.facts, ctx.has_bias = (outputs, in_features, block, row_block), bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    of_tiles, of_values = _gradients_op(grad, *ctx.saved_tensors, *ctx.facts)
    return of_tiles, of_values, grad.sum(0) if ctx.has_bias else None, *[None] * 11


_multiply_op.register_autograd(_backward, setup_context=_save)

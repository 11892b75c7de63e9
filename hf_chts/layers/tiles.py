"""Tokens cut into tiles, as products with the links alone want them: (tiles, features, width).

A link then multiplies its value with `width` neighbouring numbers, and all products of one input share its tiles: those
of queries, keys and values, and what the backward pass needs of the input. Tokens that fill up the last tile are 0.
"""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

_FEATURES = 256  # that a thread cuts at a time
_SCRATCH = 2048  # bytes of each thread, for pieces that are no 16 by 16
_FEW = 1 << 17  # numbers that are not worth a second thread
_shared = threading.local()


def tile_width(tokens: int) -> int:
    """16, 32 or 64."""
    return 16 if tokens <= 16 else 32 if tokens <= 32 else 64


def cut_tokens(x: Tensor) -> Tensor:
    """Cut x, (tokens, features) in float32 or bfloat16, into tiles."""
    from hf_chts.kernels import link_loops, threads  # late: imports numba

    tokens, features = x.shape
    width = tile_width(tokens)
    if x.stride(1) != 1 and features > 1:
        x = x.contiguous()
    tiles = x.new_empty(-(-tokens // width), features, width)
    scratch = x.new_empty(torch.get_num_threads() * _SCRATCH // x.element_size())
    threads.run(
        link_loops.cut(width, x.dtype == torch.bfloat16),
        len(tiles) * -(-features // _FEATURES),
        *(x.data_ptr(), x.stride(0), tokens, features, tiles.data_ptr(), _FEATURES, scratch.data_ptr()),
        threads=1 if x.numel() < _FEW else None,
    )
    return tiles


def uncut_tokens(tiles: Tensor, tokens: int) -> Tensor:
    """The inverse of `cut_tokens`: (tokens, features)."""
    from hf_chts.kernels import link_loops, threads  # late: imports numba

    tiles = tiles.contiguous()
    count, features, width = tiles.shape
    x = tiles.new_empty(tokens, features)
    scratch = x.new_empty(torch.get_num_threads() * _SCRATCH // x.element_size())
    threads.run(
        link_loops.uncut(width, x.dtype == torch.bfloat16),
        count * -(-features // _FEATURES),
        *(tiles.data_ptr(), tokens, features, x.data_ptr(), _FEATURES, scratch.data_ptr()),
        threads=1 if x.numel() < _FEW else None,
    )
    return x


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return cut_tokens(x.reshape(-1, x.shape[-1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "products with the links alone are differentiated once: set compute: dense for gradients of gradients"
            )
        return uncut_tokens(grad, ctx.shape[:-1].numel()).view(ctx.shape)


def shared_tiles(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tiles of x, (…, features), in a dtype; those of this thread's last call, if that was about the same tensor.

    They are kept as long as their input, and no longer. Only what a graph has computed is shared: numbers from
    outside may change with nobody counting (`x.data`, an array of numpy's), or be asked for a gradient later.
    """
    if x.is_leaf:
        return _Cut.apply(x.to(dtype))
    there = (dtype, x._version, torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(True))
    last = getattr(_shared, "last", None)
    if last is not None and last[0]() is x and last[1] == there:
        return last[2]
    tiles = _Cut.apply(x.to(dtype))

    def forget(reference: Any) -> None:
        if getattr(_shared, "last", (None,))[0] is reference:
            _shared.last = None

    _shared.last = (weakref.ref(x, forget), there, tiles)
    return tiles

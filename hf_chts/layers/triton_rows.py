"""Triton's product of a few tokens with links that lie row by row (row_links.py), of up to four weights in one launch.

One program takes one row of links for one token: it reads values and columns from end to end, which is what the memory
of a GPU is fast at, and the inputs from the cache. The interpreter, which has no loop up to a number that a kernel
reads, goes on for as many rounds as the longest row needs.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_chts.layers.row_links import RowLinks

MEMBERS = 4


@triton.jit
def _some(at, end, columns, values, x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The products of the links from `at` on, up to BLOCK of them."""
    link = at + tl.arange(0, BLOCK)
    real = link < end
    column = tl.load(columns + link, mask=real, other=0).to(tl.int32)
    value = tl.load(values + link, mask=real, other=0).to(tl.float32)
    return value * tl.load(x + column, mask=real, other=0).to(tl.float32)


@triton.jit
def _row(  # type: ignore[no-untyped-def]
    starts, columns, values, bias, result, rows, x, BLOCK: tl.constexpr, ROUNDS: tl.constexpr, BIAS: tl.constexpr
):
    row, token = tl.program_id(0), tl.program_id(1)
    if row < rows:
        begin, end = tl.load(starts + row), tl.load(starts + row + 1)
        begin, end = tl.multiple_of(begin, 8), tl.multiple_of(end, 8)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        if ROUNDS == 0:
            for at in range(begin, end, BLOCK):
                total += _some(at, end, columns, values, x, BLOCK)
        else:
            for number in range(ROUNDS):
                total += _some(begin + number * BLOCK, end, columns, values, x, BLOCK)
        found = tl.sum(total, 0)
        if BIAS:
            found += tl.load(bias + row).to(tl.float32)
        tl.store(result + token.to(tl.int64) * rows + row, found.to(result.dtype.element_ty))


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    x,
    width,
    starts0,
    columns0,
    values0,
    bias0,
    result0,
    rows0,
    starts1,
    columns1,
    values1,
    bias1,
    result1,
    rows1,
    starts2,
    columns2,
    values2,
    bias2,
    result2,
    rows2,
    starts3,
    columns3,
    values3,
    bias3,
    result3,
    rows3,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
    BIAS0: tl.constexpr,
    BIAS1: tl.constexpr,
    BIAS2: tl.constexpr,
    BIAS3: tl.constexpr,
):
    mine = x + tl.program_id(1).to(tl.int64) * width
    member = tl.program_id(2)
    if member == 0:
        _row(starts0, columns0, values0, bias0, result0, rows0, mine, BLOCK, ROUNDS, BIAS0)
    if member == 1:
        _row(starts1, columns1, values1, bias1, result1, rows1, mine, BLOCK, ROUNDS, BIAS1)
    if member == 2:
        _row(starts2, columns2, values2, bias2, result2, rows2, mine, BLOCK, ROUNDS, BIAS2)
    if member == 3:
        _row(starts3, columns3, values3, bias3, result3, rows3, mine, BLOCK, ROUNDS, BIAS3)


def products(x: Tensor, weights: Sequence[RowLinks], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """x · weightᵀ (+ bias) of each weight: (tokens, columns), contiguous → (tokens, rows), of the dtype of `x`."""
    results = [x.new_empty(len(x), weight.shape[0]) for weight in weights]
    for first in range(0, len(weights), MEMBERS):
        some = slice(first, first + MEMBERS)
        _launch(x, weights[some], biases[some], results[some])
    return results


def _launch(x: Tensor, weights: Sequence[RowLinks], biases: Sequence[Tensor | None], results: Sequence[Tensor]) -> None:
    most = max(weight.shape[0] for weight in weights)
    if not len(x) or not most:
        return
    links = sum(weight.values.numel() for weight in weights) // sum(weight.shape[0] for weight in weights)
    block = 256 if links > 128 else 128 if links > 32 else 32
    rounds = 0
    if x.device.type == "cpu":  # the interpreter
        rounds = max(1, *(-(-int(weight.starts.diff().max()) // block) for weight in weights))
    given: list[Any] = []
    for number in range(MEMBERS):
        member = number if number < len(weights) else 0
        weight, bias = weights[member], biases[member]
        tensors = (weight.starts, weight.columns, weight.values, x if bias is None else bias.contiguous())
        given += [*tensors, results[member], weight.shape[0]]
    flags = [number < len(weights) and biases[number] is not None for number in range(MEMBERS)]
    here = nullcontext() if x.device.type == "cpu" else torch.get_device_module(x.device).device(x.device.index)
    with here:
        _products[(most, len(x), len(weights))](x, x.shape[1], *given, block, rounds, *flags, num_warps=1)

"""Products with weights whose links are packed, for inference.

On a CPU loops of numba's multiply with the links themselves, and on a GPU a kernel of Triton's does for a few tokens.
Everywhere else the dense weight is made just before the product and dropped right after.
"""

import ctypes
import functools
import logging
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_chts import kernels
from hf_chts.layers.lanes import Lanes
from hf_chts.layers.row_links import RowLinks

_log = logging.getLogger(__name__)
_TILE = 64  # tokens that are multiplied with the links at a time
_FEW = 16  # tokens up to which a GPU multiplies with the links themselves
_WORK = 1024  # steps times blocks of tokens, a few microseconds, that a thread takes at least
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_kept = threading.local()

Links = Lanes | RowLinks


def products(x: Tensor, weights: Sequence[Links], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """x · weightᵀ (+ bias) of each weight: (…, columns) → (…, rows), contiguous, of the dtype of `x`.

    All weights have the same number of columns, dtype and device. The sums are float32; nothing is differentiated.
    """
    tokens = x.reshape(-1, x.shape[-1])
    fast = x.dtype in _KINDS and all(weight.values.dtype in _KINDS for weight in weights)
    loops = _loops() if fast and x.device.type == "cpu" else None
    rows = row_kernel(x.device.type) if fast and tokens.shape[0] <= _FEW else None
    if loops is not None and all(isinstance(weight, Lanes) for weight in weights):
        results = _by_lanes(loops, tokens, weights, biases)  # type: ignore[arg-type]
    elif rows is not None and all(isinstance(weight, RowLinks) for weight in weights):
        results = rows.products(tokens.contiguous(), weights, biases)
    else:
        results = [
            functional.linear(tokens, weight.dense().to(x.dtype), bias if bias is None else bias.to(x.dtype))
            for weight, bias in zip(weights, biases, strict=True)
        ]
    return [result.view(*x.shape[:-1], result.shape[-1]) for result in results]


@functools.cache
def _loops() -> ModuleType | None:
    if not kernels.available():
        _log.warning(
            "packed weights are made dense for every product, which is slow, because numba is missing: "
            'pip install "hf_chts[cpu]"'
        )
        return None
    from hf_chts.kernels import lane_products  # late: compiles

    return lane_products


@functools.cache
def row_kernel(kind: str) -> ModuleType | None:
    """The module of Triton's product, if it runs on this kind of device; it wants a C compiler there."""
    if kind not in ("cuda", "xpu"):
        return None
    try:
        from hf_chts.layers import triton_rows  # late, because not every torch comes with Triton

        one = torch.ones(1, 1, device=kind)
        nothing = torch.zeros(1, dtype=torch.int64, device=kind)
        (found,) = triton_rows.products(one, [RowLinks.of(nothing, nothing, one[0], (1, 1))], [None])
        assert found.tolist() == [[1.0]]
    except Exception as error:  # whatever it is that Triton lacks
        _log.warning("Triton's product does not run here (%s): packed weights are made dense for every product", error)
        return None
    return triton_rows


def _by_lanes(
    loops: ModuleType, tokens: Tensor, weights: Sequence[Lanes], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    from hf_chts.kernels import threads

    total = tokens.shape[0]
    kind = _KINDS[torch.bfloat16 if tokens.dtype == torch.bfloat16 else torch.float32]
    results = [
        torch.empty(total, weight.shape[0], dtype=torch.bfloat16 if kind else torch.float32) for weight in weights
    ]
    constants = [None if bias is None else bias.detach().float().contiguous() for bias in biases]
    members = _words(
        word
        for weight in weights
        for word in (
            weight.values.data_ptr(),
            weight.gaps.data_ptr(),
            weight.starts.data_ptr(),
            weight.rows.data_ptr(),
            weight.groups,
            weight.gaps.element_size(),
            _KINDS[weight.values.dtype],
            weight.shape[0],
        )
    )
    columns = tokens.shape[1]
    for first in range(0, total, _TILE):
        count = min(_TILE, total - first)
        tile = tokens if count == total else tokens[first : first + count]
        width = next(width for width in (1, 4, 8, 16) if count <= width or width == 16)
        blocks = -(-count // width)
        x = _side_by_side(tile, width, blocks)
        places = _words(
            word
            for result, bias in zip(results, constants, strict=True)
            for word in (
                result.data_ptr() + first * result.stride(0) * result.element_size(),
                0 if bias is None else bias.data_ptr(),
            )
        )
        steps = [weight.values.shape[0] for weight in weights]
        chunks = max(1, min(max(weight.groups for weight in weights), max(steps) * blocks // _WORK))
        team = max(1, min(torch.get_num_threads(), sum(steps) * blocks // _WORK))
        each = loops.scratch_words(width, blocks)
        scratch = _scratch(team * each)
        threads.run(
            loops.products.address,
            chunks * len(weights),
            ctypes.addressof(members),
            x.data_ptr(),
            count,
            width,
            blocks,
            columns,
            scratch.data_ptr(),
            each,
            ctypes.addressof(places),
            kind,
            chunks,
            threads=team,
        )
    return [result if result.dtype == tokens.dtype else result.to(tokens.dtype) for result in results]


def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x · weightᵀ (+ bias) of one token and a dense weight, at the speed of the memory; None: torch is to multiply.

    torch's own product of a bfloat16 weight with one token takes about twice as long as its bytes need.
    """
    one = x.numel() == x.shape[-1] == weight.shape[1] and weight.is_contiguous()
    kinds = {weight.dtype, x.dtype} <= {torch.float32, torch.bfloat16} and x.device.type == weight.device.type == "cpu"
    loops = _loops() if one and kinds else None
    if loops is None:
        return None
    from hf_chts.kernels import threads

    inputs = x.detach().float().contiguous()
    constant = None if bias is None else bias.detach().float().contiguous()
    rows, columns = weight.shape
    result = torch.empty(*x.shape[:-1], rows, dtype=x.dtype)
    size = 4 * max(1, 1 << 14 >> columns.bit_length())  # rows of a chunk, about 64 KiB
    chunks = -(-rows // size)
    team = min(torch.get_num_threads(), -(-chunks // 4))
    threads.run(
        loops.dense_product.address,
        chunks,
        weight.data_ptr(),
        _KINDS[weight.dtype],
        rows,
        columns,
        inputs.data_ptr(),
        0 if constant is None else constant.data_ptr(),
        result.data_ptr(),
        _KINDS[result.dtype],
        size,
        _scratch(team * 64).data_ptr(),
        64,
        threads=team,
    )
    return result


def _words(numbers: Any) -> Any:
    given = list(numbers)
    return (ctypes.c_int64 * len(given))(*given)


def _side_by_side(tokens: Tensor, width: int, blocks: int) -> Tensor:
    """(tokens, columns) → float32 (blocks, columns, width), zeros after the last token."""
    tokens = tokens.detach().float()
    if width == 1:
        return tokens.contiguous()
    missing = blocks * width - tokens.shape[0]
    if missing:
        tokens = functional.pad(tokens, (0, 0, 0, missing))
    return tokens.view(blocks, width, -1).transpose(1, 2).contiguous()


def _scratch(words: int) -> Tensor:
    """Memory that the next product of this Python thread writes over."""
    kept = getattr(_kept, "scratch", None)
    if kept is None or kept.numel() < words:
        with torch.inference_mode(False):
            kept = _kept.scratch = torch.empty(words, dtype=torch.int32)
    return kept


# For compiled models, and where a gradient goes through to x: an operator that a compiler takes as it is.


@torch.library.custom_op("hf_chts::packed_products", mutates_args=())
def packed_products(
    x: Tensor, tensors: Sequence[Tensor], rows: Sequence[int], columns: int, biases: Sequence[Tensor]
) -> list[Tensor]:
    """`products`, of the tensors of all weights one after the other; biases of all weights, or none."""
    weights = _weights(tensors, rows, columns)
    return products(x, weights, list(biases) if len(biases) else [None] * len(weights))


@packed_products.register_fake
def _(
    x: Tensor, tensors: Sequence[Tensor], rows: Sequence[int], columns: int, biases: Sequence[Tensor]
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], size) for size in rows]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, tensors, ctx.rows, ctx.columns, biases = inputs
    ctx.biases = len(biases)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    weights = _weights(ctx.saved_tensors, ctx.rows, ctx.columns)
    of_x: Any = sum(grad @ weight.dense().to(grad.dtype) for grad, weight in zip(grads, weights, strict=True))
    return of_x, [None] * len(ctx.saved_tensors), None, None, [None] * ctx.biases


packed_products.register_autograd(_backward, setup_context=_save)


def _weights(tensors: Sequence[Tensor], rows: Sequence[int], columns: int) -> list[Links]:
    each = len(tensors) // len(rows)
    parts = [tensors[begin : begin + each] for begin in range(0, len(tensors), each)]
    kind: Any = Lanes if each == len(Lanes.NAMES) else RowLinks
    return [kind(*part, (size, columns)) for part, size in zip(parts, rows, strict=True)]

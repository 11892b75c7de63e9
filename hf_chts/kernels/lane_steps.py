"""Steps of lanes (layers/lanes.py): turned into columns and numbers, and multiplied with tokens.

Loads of single inputs are put together by hand: on processors of 2023 that is twice as fast as their gathers.
"""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from hf_chts.kernels.vectors import (
    FLOAT,
    INT8,
    INT16,
    INT32,
    INT64,
    at,
    load,
    loop,
    multiply_add,
    splat,
    store,
    vector,
)

LANES = 16
FLOAT32, BFLOAT16, FLOAT16 = range(3)  # kinds of values, and of results
WIDTHS = (1, 4, 8, 16)  # tokens side by side


def _number(builder: Any, address: Any, kind: int) -> Any:
    """Sixteen values, as float32."""
    if kind == FLOAT32:
        return load(builder, address, vector(FLOAT, LANES), 4)
    wide = vector(INT32, LANES)
    bits = builder.zext(load(builder, address, vector(INT16, LANES), 2), wide)
    if kind == BFLOAT16:
        return builder.bitcast(builder.shl(bits, splat(wide, 16)), vector(FLOAT, LANES))
    # exponent and fraction where float32 has them, with float16's bias; the factor puts that right, small ones too
    sign = builder.shl(builder.and_(bits, splat(wide, 0x8000)), splat(wide, 16))
    rest = builder.shl(builder.and_(bits, splat(wide, 0x7FFF)), splat(wide, 13))
    scaled = builder.fmul(builder.bitcast(rest, vector(FLOAT, LANES)), splat(vector(FLOAT, LANES), float(2**112)))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, wide), sign), vector(FLOAT, LANES))


def _decoder(width: int, kind: int) -> Any:
    """void(gaps, values, steps, last, columns, numbers): decode steps; `last` are the columns of the step before."""

    @intrinsic
    def decode(typingctx: Any, gaps: Any, values: Any, steps: Any, last: Any, columns: Any, numbers: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            gaps, values, steps, last, columns, numbers = arguments
            wide, narrow = vector(INT32, LANES), vector(INT8 if width == 1 else INT16, LANES)

            def step(number: Any, carried: Any) -> Any:
                gap = load(builder, at(builder, gaps, number, LANES * width), narrow, width)
                column = builder.add(carried[0], builder.zext(gap, wide))
                store(builder, column, at(builder, columns, number, 4 * LANES), 4)
                place = at(builder, values, number, LANES * (4 if kind == FLOAT32 else 2))
                store(builder, _number(builder, place, kind), at(builder, numbers, number, 4 * LANES), 4)
                return [column]

            (column,) = loop(builder, steps, [load(builder, last, wide, 4)], step)
            store(builder, column, last, 4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return decode


def _columns(width: int) -> Any:
    """void(gaps, steps, last, columns): as `_decoder`, of the columns alone."""

    @intrinsic
    def decode(typingctx: Any, gaps: Any, steps: Any, last: Any, columns: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            gaps, steps, last, columns = arguments
            wide, narrow = vector(INT32, LANES), vector(INT8 if width == 1 else INT16, LANES)

            def step(number: Any, carried: Any) -> Any:
                gap = load(builder, at(builder, gaps, number, LANES * width), narrow, width)
                column = builder.add(carried[0], builder.zext(gap, wide))
                store(builder, column, at(builder, columns, number, 4 * LANES), 4)
                return [column]

            (column,) = loop(builder, steps, [load(builder, last, wide, 4)], step)
            store(builder, column, last, 4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), generate

    return decode


def _one_token(kind: int) -> Any:
    """void(columns, values, steps, x, sums): add the products with one token to the sums of the sixteen lanes."""

    @intrinsic
    def one(typingctx: Any, columns: Any, values: Any, steps: Any, x: Any, sums: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            columns, values, steps, x, sums = arguments
            wide = vector(FLOAT, LANES)

            def step(number: Any, carried: Any) -> Any:
                inputs = ir.Constant(wide, ir.Undefined)
                here = at(builder, columns, number, 4 * LANES)
                for lane in range(LANES):
                    column = load(builder, builder.add(here, ir.Constant(INT64, 4 * lane)), INT32, 4)
                    found = load(builder, at(builder, x, builder.zext(column, INT64), 4), FLOAT, 4)
                    inputs = builder.insert_element(inputs, found, ir.Constant(INT32, lane))
                place = at(builder, values, number, LANES * (4 if kind == FLOAT32 else 2))
                return [multiply_add(builder, _number(builder, place, kind), inputs, carried[0])]

            (total,) = loop(builder, steps, [load(builder, sums, wide, 4)], step)
            store(builder, total, sums, 4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5), generate

    return one


def _tokens(width: int) -> Any:
    """void(columns, numbers, steps, x, sums), for `width` tokens: x is (columns, width), the sums are (16, width)."""
    at_once = 8  # rows whose sums stay in registers

    @intrinsic
    def several(typingctx: Any, columns: Any, numbers: Any, steps: Any, x: Any, sums: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            columns, numbers, steps, x, sums = arguments
            kind = vector(FLOAT, width)
            everywhere = ir.Constant(vector(INT32, width), [0] * width)
            for first in range(0, LANES, at_once):
                lanes = range(first, first + at_once)

                def step(number: Any, carried: Any, lanes: Any = lanes) -> Any:
                    here, there = (at(builder, base, number, 4 * LANES) for base in (columns, numbers))
                    totals = []
                    for lane, total in zip(lanes, carried, strict=True):
                        offset = ir.Constant(INT64, 4 * lane)
                        column = load(builder, builder.add(here, offset), INT32, 4)
                        inputs = load(builder, at(builder, x, builder.zext(column, INT64), 4 * width), kind, 4)
                        value = load(builder, builder.add(there, offset), FLOAT, 4)
                        single = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(INT32, 0))
                        spread = builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), everywhere)
                        totals.append(multiply_add(builder, spread, inputs, total))
                    return totals

                places = [builder.add(sums, ir.Constant(INT64, 4 * width * lane)) for lane in lanes]
                totals = loop(builder, steps, [load(builder, place, kind, 4) for place in places], step)
                for total, place in zip(totals, places, strict=True):
                    store(builder, total, place, 4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5), generate

    return several


def _four_rows(kind: int) -> Any:
    """void(weight, stride, steps, x, sums): add the products of four dense rows, sixteen columns at a time."""
    size = 4 if kind == FLOAT32 else 2

    @intrinsic
    def four(typingctx: Any, weight: Any, stride: Any, steps: Any, x: Any, sums: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weight, stride, steps, x, sums = arguments
            wide = vector(FLOAT, LANES)

            def step(number: Any, carried: Any) -> Any:
                inputs = load(builder, at(builder, x, number, 4 * LANES), wide, 4)
                totals = []
                for row, total in enumerate(carried):
                    start = builder.add(weight, builder.mul(stride, ir.Constant(INT64, row)))
                    values = _number(builder, at(builder, start, number, size * LANES), kind)
                    totals.append(multiply_add(builder, values, inputs, total))
                return totals

            places = [builder.add(sums, ir.Constant(INT64, 4 * LANES * row)) for row in range(4)]
            totals = loop(builder, steps, [load(builder, place, wide, 4) for place in places], step)
            for total, place in zip(totals, places, strict=True):
                store(builder, total, place, 4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5), generate

    return four


four_rows_f, four_rows_b = _four_rows(FLOAT32), _four_rows(BFLOAT16)
_decoders = [[_decoder(width, kind) for kind in (FLOAT32, BFLOAT16, FLOAT16)] for width in (1, 2)]
_decode_8_f, _decode_8_b, _decode_8_h = _decoders[0]
_decode_16_f, _decode_16_b, _decode_16_h = _decoders[1]
_columns_8, _columns_16 = _columns(1), _columns(2)
_one_f, _one_b, _one_h = (_one_token(kind) for kind in (FLOAT32, BFLOAT16, FLOAT16))
_four, _eight, _sixteen = _tokens(4), _tokens(8), _tokens(16)


@njit(inline="always")
def decode(width, kind, gaps, values, steps, last, columns, numbers):  # type: ignore[no-untyped-def] # numba types it
    if width == 1:
        if kind == BFLOAT16:
            _decode_8_b(gaps, values, steps, last, columns, numbers)
        elif kind == FLOAT32:
            _decode_8_f(gaps, values, steps, last, columns, numbers)
        else:
            _decode_8_h(gaps, values, steps, last, columns, numbers)
    elif kind == BFLOAT16:
        _decode_16_b(gaps, values, steps, last, columns, numbers)
    elif kind == FLOAT32:
        _decode_16_f(gaps, values, steps, last, columns, numbers)
    else:
        _decode_16_h(gaps, values, steps, last, columns, numbers)


@njit(inline="always")
def multiply(tokens, columns, numbers, steps, x, sums):  # type: ignore[no-untyped-def]
    if tokens == 4:
        _four(columns, numbers, steps, x, sums)
    elif tokens == 8:
        _eight(columns, numbers, steps, x, sums)
    else:
        _sixteen(columns, numbers, steps, x, sums)


@njit(inline="always")
def multiply_one(width, kind, gaps, values, steps, last, columns, x, sums):  # type: ignore[no-untyped-def]
    if width == 1:
        _columns_8(gaps, steps, last, columns)
    else:
        _columns_16(gaps, steps, last, columns)
    if kind == BFLOAT16:
        _one_b(columns, values, steps, x, sums)
    elif kind == FLOAT32:
        _one_f(columns, values, steps, x, sums)
    else:
        _one_h(columns, values, steps, x, sums)

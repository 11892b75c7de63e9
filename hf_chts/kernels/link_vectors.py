"""What numba does not say in its own language: loops on vectors of 16 numbers, written as LLVM's instructions.

LLVM makes of a vector of 16 floats what the processor has: one register of AVX-512, two of AVX2, four of NEON. Left to
itself it finds these loops too seldom, and then scatters them over memory.

Numbers are float32, or bfloat16 with sums in float32. A width or a kind of numbers is a constant where it is asked for.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOATS, _SHORTS, _INTS = (ir.VectorType(kind, LANES) for kind in (_F32, _I16, _I32))
_FAST = ("contract", "nsz")


def _pointer(builder: Any, address: Any, kind: Any, offset: Any = None) -> Any:
    pointer = builder.inttoptr(address, kind.as_pointer())
    return pointer if offset is None else builder.gep(pointer, [offset])


def _load(builder: Any, address: Any, offset: Any, half: bool = False) -> Any:
    """16 numbers as floats, from the `offset`-th on."""
    if not half:
        place = _pointer(builder, address, _F32, offset)
        return builder.load(builder.bitcast(place, _FLOATS.as_pointer()), align=4, typ=_FLOATS)
    place = _pointer(builder, address, _I16, offset)
    bits = builder.load(builder.bitcast(place, _SHORTS.as_pointer()), align=2, typ=_SHORTS)
    return builder.bitcast(builder.shl(builder.zext(bits, _INTS), _all(16)), _FLOATS)


def _store(builder: Any, vector: Any, address: Any, offset: Any, half: bool = False) -> None:
    if not half:
        place = _pointer(builder, address, _F32, offset)
        builder.store(vector, builder.bitcast(place, _FLOATS.as_pointer()), align=4)
        return
    # to the nearest bfloat16, ties to even; what is no number stays none
    bits = builder.bitcast(vector, _INTS)
    odd = builder.and_(builder.lshr(bits, _all(16)), _all(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _all(0x7FFF))), _all(16))
    quiet = builder.or_(builder.lshr(bits, _all(16)), _all(0x40))
    chosen = builder.select(builder.fcmp_unordered("uno", vector, vector), quiet, rounded)
    place = _pointer(builder, address, _I16, offset)
    builder.store(builder.trunc(chosen, _SHORTS), builder.bitcast(place, _SHORTS.as_pointer()), align=2)


def _all(number: int) -> ir.Constant:
    return ir.Constant(_INTS, [number] * LANES)


def _spread(builder: Any, scalar: Any) -> Any:
    """16 times the same float."""
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(_INTS, [0] * LANES))


def _add(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b, flags=_FAST)


def _muladd(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _add(builder, builder.fmul(a, b, flags=_FAST), c)


def _index(builder: Any, address: Any, place: Any, short: bool) -> Any:
    """An index of 16 bits without sign, or of 32 with it."""
    kind = _I16 if short else _I32
    return builder.zext(builder.load(_pointer(builder, address, kind, place), typ=kind), _I64)


def _literal(argument: Any) -> int:
    return int(argument.literal_value)


def _accumulators(context: Any) -> int:
    """How many vectors of 16 floats the processor holds in registers, with some to spare."""
    return 8 if "+avx512f" in context.codegen()._tm_features else 4


@intrinsic(prefer_literal=True)
def accumulate(
    typingctx: Any, tile: Any, columns: Any, values: Any, start: Any, stop: Any, out: Any, fresh: Any, width: Any,
    half: Any, short: Any,
) -> Any:  # fmt: skip
    """out[0:width] (+)= Σ values[k] · tile[columns[k]][0:width] for k from start to stop.

    Args:
        tile, columns, values, out: addresses; `tile` is of vectors of `width` numbers, `out` and `values` of floats.
        fresh: whether `out` is written, or added to.
        half: whether the tile is bfloat16.
        short: whether columns have 16 bits.
    """
    vectors, is_half, is_short = _literal(width) // LANES, bool(_literal(half)), bool(_literal(short))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at_tile, at_columns, at_values, first, last, at_out, is_fresh, *_ = arguments
        sets = max(1, _accumulators(context) // vectors)
        zero = ir.Constant(_FLOATS, [0.0] * LANES)
        sums = [[cgutils.alloca_once(builder, _FLOATS) for _ in range(vectors)] for _ in range(sets)]
        for each in sums:
            for place in each:
                builder.store(zero, place)

        def link(place: Any, into: list[Any]) -> None:
            row = builder.mul(_index(builder, at_columns, place, is_short), ir.Constant(_I64, vectors * LANES))
            value = _spread(builder, builder.load(_pointer(builder, at_values, _F32, place), typ=_F32))
            for number, total in enumerate(into):
                numbers = _load(builder, at_tile, builder.add(row, ir.Constant(_I64, number * LANES)), is_half)
                builder.store(_muladd(builder, numbers, value, builder.load(total)), total)

        count = builder.sub(last, first)
        whole = builder.add(first, builder.mul(builder.sdiv(count, ir.Constant(_I64, sets)), ir.Constant(_I64, sets)))
        with cgutils.for_range_slice(builder, first, whole, ir.Constant(_I64, sets), _I64) as (place, _):
            for number, each in enumerate(sums):
                link(builder.add(place, ir.Constant(_I64, number)), each)
        if sets > 1:
            with cgutils.for_range_slice(builder, whole, last, ir.Constant(_I64, 1), _I64) as (place, _):
                link(place, sums[0])
        for number in range(vectors):
            total = builder.load(sums[0][number])
            for each in sums[1:]:
                total = _add(builder, total, builder.load(each[number]))
            offset = ir.Constant(_I64, number * LANES)
            with cgutils.if_unlikely(builder, builder.not_(is_fresh)):
                builder.store(_add(builder, total, _load(builder, at_out, offset)), sums[0][number])
            with cgutils.if_likely(builder, is_fresh):
                builder.store(total, sums[0][number])
            _store(builder, builder.load(sums[0][number]), at_out, offset)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(int64, int64, int64, int64, int64, int64, types.boolean, width, half, short), generate


@intrinsic(prefer_literal=True)
def sample(
    typingctx: Any, tile: Any, columns: Any, row: Any, start: Any, stop: Any, out: Any, width: Any, half: Any,
    short: Any,
) -> Any:  # fmt: skip
    """out[k] += Σ row[0:width] · tile[columns[k]][0:width] for k from start to stop.

    Args:
        tile, columns, row, out: addresses; `tile` and `row` are of vectors of `width` numbers, `out` of floats.
        half: whether tile and row are bfloat16.
        short: whether columns have 16 bits.
    """
    vectors, is_half, is_short = _literal(width) // LANES, bool(_literal(half)), bool(_literal(short))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at_tile, at_columns, at_row, first, last, at_out, *_ = arguments
        mine = [_load(builder, at_row, ir.Constant(_I64, number * LANES), is_half) for number in range(vectors)]

        def product(place: Any) -> Any:
            base = builder.mul(_index(builder, at_columns, place, is_short), ir.Constant(_I64, vectors * LANES))
            total = None
            for number, numbers in enumerate(mine):
                offset = builder.add(base, ir.Constant(_I64, number * LANES))
                theirs = _load(builder, at_tile, offset, is_half)
                total = (
                    builder.fmul(numbers, theirs, flags=_FAST)
                    if total is None
                    else _muladd(builder, numbers, theirs, total)
                )
            return total

        def products(place: Any, count: int, clamped: bool) -> Any:
            """The sums of `count` links, one in each lane."""
            waiting: list[tuple[int, Any]] = []
            for number in range(count):
                there = builder.add(place, ir.Constant(_I64, number))
                if clamped:
                    end = builder.sub(last, ir.Constant(_I64, 1))
                    there = builder.select(builder.icmp_signed("<", there, end), there, end)
                level, vector = 0, product(there)
                while waiting and waiting[-1][0] == level:
                    vector, level = _pairs(builder, waiting.pop()[1], vector), level + 1
                waiting.append((level, vector))
            ((level, vector),) = waiting
            while level < 4:
                vector, level = _pairs(builder, vector, vector), level + 1
            return vector

        many = builder.and_(builder.sub(last, first), ir.Constant(_I64, -LANES))
        whole = builder.add(first, many)
        with cgutils.for_range_slice(builder, first, whole, ir.Constant(_I64, LANES), _I64) as (place, _):
            found = products(place, LANES, clamped=False)
            _store(builder, _add(builder, found, _load(builder, at_out, place)), at_out, place)
        left = builder.sub(last, whole)
        some = cgutils.alloca_once(builder, ir.ArrayType(_F32, LANES))
        for low, high in ((0, 4), (4, 8), (8, 16)):
            within = builder.and_(
                builder.icmp_signed(">", left, ir.Constant(_I64, low)),
                builder.icmp_signed("<=", left, ir.Constant(_I64, high)),
            )
            with builder.if_then(within):
                builder.store(products(whole, high, clamped=True), builder.bitcast(some, _FLOATS.as_pointer()), align=4)
        with cgutils.for_range_slice(builder, ir.Constant(_I64, 0), left, ir.Constant(_I64, 1), _I64) as (number, _):
            found = builder.load(builder.gep(some, [ir.Constant(_I64, 0), number]), typ=_F32)
            place = _pointer(builder, at_out, _F32, builder.add(whole, number))
            builder.store(builder.fadd(found, builder.load(place, typ=_F32)), place)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(int64, int64, int64, int64, int64, int64, width, half, short), generate


def _pairs(builder: Any, a: Any, b: Any) -> Any:
    """The sums of neighbours of a, then those of b."""
    even, odd = (builder.shuffle_vector(a, b, ir.Constant(_INTS, list(range(first, 2 * LANES, 2)))) for first in (0, 1))
    return builder.fadd(even, odd)


@intrinsic(prefer_literal=True)
def transpose(
    typingctx: Any, source: Any, stride: Any, target: Any, target_stride: Any, bias: Any, half: Any, half_target: Any
) -> Any:
    """Write the transposed of a matrix of 16 by 16 numbers.

    Args:
        source, target: addresses of the first number of each.
        stride, target_stride: numbers from one row to the next.
        bias: the address of 16 floats that are added to each row of the target; 0: none.
        half, half_target: whether they are bfloat16.
    """
    is_half, is_half_target = bool(_literal(half)), bool(_literal(half_target))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at_source, width, at_target, target_width, at_bias, *_ = arguments
        rows = [
            _load(builder, at_source, builder.mul(width, ir.Constant(_I64, number)), is_half) for number in range(LANES)
        ]
        step = LANES // 2
        while step:  # swap the blocks off the diagonal, of 8 by 8, then 4 by 4 in each, …
            upper = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
            lower = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
            for number in range(LANES):
                if not number & step:
                    a, b = rows[number], rows[number + step]
                    rows[number] = builder.shuffle_vector(a, b, ir.Constant(_INTS, upper))
                    rows[number + step] = builder.shuffle_vector(a, b, ir.Constant(_INTS, lower))
            step //= 2
        added = cgutils.alloca_once(builder, _FLOATS)
        builder.store(ir.Constant(_FLOATS, [-0.0] * LANES), added)
        with cgutils.if_unlikely(builder, builder.icmp_signed("!=", at_bias, ir.Constant(_I64, 0))):
            builder.store(_load(builder, at_bias, ir.Constant(_I64, 0)), added)
        bias_row = builder.load(added)
        for number, row in enumerate(rows):
            there = builder.mul(target_width, ir.Constant(_I64, number))
            _store(builder, builder.fadd(row, bias_row), at_target, there, is_half_target)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(int64, int64, int64, int64, int64, half, half_target), generate

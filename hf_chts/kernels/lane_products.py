"""Products of a few tokens with weights whose links lie in lanes (layers/lanes.py), on the CPU.

The bytes of the links come from memory once for a tile of tokens. A thread turns some steps of a group into columns and
numbers, which stay in its first cache, and then takes for one token the inputs of sixteen links, from wherever they
are, at a time; for several tokens one link at a time, with the inputs of up to sixteen tokens side by side.
"""

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from hf_chts.kernels.lane_steps import (
    BFLOAT16,
    FLOAT32,
    LANES,
    decode,
    four_rows_b,
    four_rows_f,
    multiply,
    multiply_one,
)
from hf_chts.kernels.threads import VERSION, claim, compiled, float32_at, int32_at, int64_at, uint16_at
from hf_chts.kernels.vectors import FLOAT, INT32, INT64

CHUNK = 32  # steps that are decoded at a time
_MEMBER = 8  # words that describe one weight


@intrinsic
def _bits(typingctx: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], INT32)

    return types.uint32(types.float32), generate


@intrinsic
def _float(typingctx: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], FLOAT)

    return types.float32(types.uint32), generate


@intrinsic
def _address(typingctx: Any, pointer: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(arguments[0], INT64)

    return types.int64(types.voidptr), generate


@njit(inline="always")
def _rounded(value):  # type: ignore[no-untyped-def]
    """The bits of the bfloat16 that is nearest to a float32, the even one of two."""
    bits = _bits(value)
    if value != value:
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(inline="always")
def _group_of(starts, groups, step):  # type: ignore[no-untyped-def]
    """The first group that begins at this step or later."""
    low, high = 0, groups
    while low < high:
        middle = (low + high) // 2
        if starts[middle] < step:
            low = middle + 1
        else:
            high = middle
    return low


def _products() -> Any:
    MADE_OF = VERSION

    @compiled
    def products(data):  # type: ignore[no-untyped-def]
        """A loop of hf_chts/kernels/threads.py.

        Its words: the address of the members, 8 words each (values, gaps, starts, rows, groups, gap's bytes, kind of
        values, out); x, (blocks, columns, width); tokens; width; blocks; columns; scratch of each thread, and its
        words; the addresses of the results, (tokens, out) of each member, and of the biases, float32 or 0; the kind of
        results; chunks of a member.
        """
        words = carray(int64_at(_address(data)), 14)
        members = carray(int64_at(words[3]), _MEMBER * (words[1] // words[13]))
        x, tokens, width, blocks, columns = words[4], words[5], words[6], words[7], words[8]
        results, kind, chunks = words[11], words[12], words[13]
        scratch = words[9] + 4 * words[10] * claim(data, 2) + 0 * MADE_OF
        last, decoded = carray(int32_at(scratch), LANES), scratch + 4 * LANES
        numbers = decoded + 4 * LANES * CHUNK
        sums_at = numbers + 4 * LANES * CHUNK
        sums = carray(float32_at(sums_at), LANES * width * blocks)
        chunk = claim(data, 0)
        while chunk < words[1]:
            member, part = chunk // chunks, chunk % chunks
            about = members[_MEMBER * member : _MEMBER * member + _MEMBER]
            groups, gap_bytes, value_kind, out = about[4], about[5], about[6], about[7]
            value_bytes = 4 if value_kind == FLOAT32 else 2
            starts = carray(int64_at(about[2]), groups + 1)
            rows = carray(int32_at(about[3]), groups * LANES)
            places = carray(int64_at(results), 2 * (words[1] // chunks))
            result, bias = places[2 * member], places[2 * member + 1]
            total = starts[groups]
            first = 0 if part == 0 else _group_of(starts, groups, total * part // chunks)
            end = groups if part == chunks - 1 else _group_of(starts, groups, total * (part + 1) // chunks)
            for group in range(first, end):
                last[:] = 0
                sums[:] = 0
                step, stop = starts[group], starts[group + 1]
                while step < stop:
                    count = min(CHUNK, stop - step)
                    gaps = about[1] + step * LANES * gap_bytes
                    values = about[0] + step * LANES * value_bytes
                    if width == 1:
                        multiply_one(gap_bytes, value_kind, gaps, values, count, scratch, decoded, x, sums_at)
                    else:
                        decode(gap_bytes, value_kind, gaps, values, count, scratch, decoded, numbers)
                        for block in range(blocks):
                            tile = x + 4 * block * columns * width
                            multiply(width, decoded, numbers, count, tile, sums_at + 4 * block * LANES * width)
                    step += count
                for lane in range(LANES):
                    row = rows[group * LANES + lane]
                    if row >= 0:
                        constant = np.float32(0)
                        if bias != 0:
                            constant = carray(float32_at(bias), out)[row]
                        for token in range(tokens):
                            value = sums[(token // width * LANES + lane) * width + token % width] + constant
                            if kind == BFLOAT16:
                                carray(uint16_at(result), tokens * out)[token * out + row] = _rounded(value)
                            else:
                                carray(float32_at(result), tokens * out)[token * out + row] = value
            chunk = claim(data, 0)

    return products


products = _products()


def scratch_words(width: int, blocks: int) -> int:
    """How many 4-byte words of scratch a thread needs."""
    return LANES * (1 + 2 * CHUNK + width * blocks)


def _dense_product() -> Any:
    MADE_OF = VERSION

    @compiled
    def dense_product(data):  # type: ignore[no-untyped-def]
        """A loop of threads.py: the product of one token with a dense weight, whose rows the threads share.

        Its words: weight, (rows, columns); kind of its values; rows; columns; x, float32; bias, float32 or 0; result;
        its kind; rows of a chunk; scratch of each thread, and its words.
        """
        words = carray(int64_at(_address(data)), 14)
        weight, value_kind, rows, columns, x, bias = words[3], words[4], words[5], words[6], words[7], words[8]
        result, kind, size = words[9], words[10], words[11]
        scratch = words[12] + 4 * words[13] * claim(data, 2) + 0 * MADE_OF
        sums = carray(float32_at(scratch), 4 * LANES)
        inputs = carray(float32_at(x), columns)
        value_bytes = 4 if value_kind == FLOAT32 else 2
        steps = columns // LANES
        chunk = claim(data, 0)
        while chunk < words[1]:
            for first in range(chunk * size, min(rows, (chunk + 1) * size), 4):
                count = min(4, rows - first)
                sums[:] = 0
                here = weight + first * columns * value_bytes
                stride = columns * value_bytes if count == 4 else 0
                for row in range(1 if count == 4 else count):
                    start = here + row * columns * value_bytes
                    if value_kind == BFLOAT16:
                        four_rows_b(start, stride, steps, x, scratch)
                    else:
                        four_rows_f(start, stride, steps, x, scratch)
                    for part in range(4 if count == 4 else 1):
                        total = np.float32(0)
                        for lane in range(LANES):
                            total += sums[part * LANES + lane]
                        number = first + row + part
                        for column in range(steps * LANES, columns):
                            place = number * columns + column
                            if value_kind == BFLOAT16:
                                bits = np.uint32(carray(uint16_at(weight), rows * columns)[place]) << np.uint32(16)
                                total += _float(bits) * inputs[column]
                            else:
                                total += carray(float32_at(weight), rows * columns)[place] * inputs[column]
                        if bias != 0:
                            total += carray(float32_at(bias), rows)[number]
                        if kind == BFLOAT16:
                            carray(uint16_at(result), rows)[number] = _rounded(total)
                        else:
                            carray(float32_at(result), rows)[number] = total
                    sums[:] = 0
            chunk = claim(data, 0)

    return dense_product


dense_product = _dense_product()

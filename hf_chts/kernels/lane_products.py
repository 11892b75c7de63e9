"""Products of a few tokens with weights whose links lie in lanes (layers/lanes.py), on the CPU.

The bytes of the links come from memory once for a tile of tokens. A thread turns some steps of a group into columns and
numbers, which stay in its first cache, and then takes for one token the inputs of sixteen links, from wherever they
are, at a time; for several tokens one link at a time, with the inputs of up to sixteen tokens side by side.
"""

from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from hf_chts.kernels.lane_steps import BFLOAT16, FLOAT32, LANES, decode, multiply
from hf_chts.kernels.threads import claim, float32_at, int32_at, int64_at, uint16_at
from hf_chts.kernels.vectors import INT32, INT64

CHUNK = 32  # steps that are decoded at a time
_MEMBER = 8  # words that describe one weight


@intrinsic
def _bits(typingctx: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], INT32)

    return types.uint32(types.float32), generate


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


@cfunc("void(voidptr)", cache=True)
def products(data):  # type: ignore[no-untyped-def]
    """A loop of hf_chts/kernels/threads.py.

    Its words: the address of the members, 8 words each (values, gaps, starts, rows, groups, gap's bytes, kind of
    values, out); x, (blocks, columns, width); tokens; width; blocks; columns; scratch of each thread, and its words;
    the addresses of the results, (tokens, out) of each member, and of the biases, float32 or 0; the kind of results;
    chunks of a member.
    """
    words = carray(int64_at(_address(data)), 14)
    members = carray(int64_at(words[3]), _MEMBER * (words[1] // words[13]))
    x, tokens, width, blocks, columns = words[4], words[5], words[6], words[7], words[8]
    results, kind, chunks = words[11], words[12], words[13]
    scratch = words[9] + 4 * words[10] * claim(data, 2)
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
                decode(
                    gap_bytes,
                    value_kind,
                    about[1] + step * LANES * gap_bytes,
                    about[0] + step * LANES * value_bytes,
                    count,
                    scratch,
                    decoded,
                    numbers,
                )
                for block in range(blocks):
                    multiply(
                        width,
                        decoded,
                        numbers,
                        count,
                        x + 4 * block * columns * width,
                        sums_at + 4 * block * LANES * width,
                    )
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


def scratch_words(width: int, blocks: int) -> int:
    """How many 4-byte words of scratch a thread needs."""
    return LANES * (1 + 2 * CHUNK + width * blocks)

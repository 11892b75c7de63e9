"""The loops of a layer's products with its links alone, compiled for a tile's width and kind of numbers.

Tokens go through in tiles of 16, 32 or 64: (tiles, features, width), so that a link is one multiplication of its value
with a vector, and a tile stays in the cache of its core while all links go over it. Links lie by (block of columns,
row, column): a tile of many features is worked through in blocks of them that fit.

Every loop is made once in a process, and taken from numba's cache on disk after that. Addresses and sizes come as words
(threads.py), in the order in which they are unpacked.
"""

# numba types these functions itself
# mypy: disallow-untyped-defs=False
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit

from hf_chts.kernels import threads
from hf_chts.kernels.link_vectors import accumulate, sample, transpose
from hf_chts.kernels.subnormal import flush, restore
from hf_chts.kernels.threads import claim, float32_at, int32_at, int64_at, uint16_at, uint32_at, words_of


def compiled(function: Callable[[Any], None]) -> int:
    """The address of a loop, compiled; it must be kept by its caller."""
    made = threads.compiled(function, error_model="numpy")
    _KEPT.append(made)
    assert made.address is not None
    return made.address


_KEPT: list[Any] = []  # compiled code lives as long as its object


@njit(inline="always")
def copy_numbers(source, stride, target, target_stride, rows, columns, half):
    """A piece of a matrix, bit by bit."""
    for row in range(rows):
        if half:
            from_, to = (
                carray(uint16_at(source + 2 * stride * row), 16),
                carray(uint16_at(target + 2 * target_stride * row), 16),
            )
            for column in range(columns):
                to[column] = from_[column]
        else:
            froms, tos = (
                carray(uint32_at(source + 4 * stride * row), 16),
                carray(uint32_at(target + 4 * target_stride * row), 16),
            )
            for column in range(columns):
                tos[column] = froms[column]


@njit(inline="always")
def clear(address, count):
    numbers = carray(uint32_at(address), count)
    for number in range(count):
        numbers[number] = 0


@functools.cache
def cut(width: int, half: bool) -> int:
    """Cut tokens, (tokens, features) with rows at a stride, into tiles; tokens that fill up the last tile are 0."""
    W, HALF, SIZE, MADE_OF = width, half, 2 if half else 4, threads.VERSION

    def loop(data):
        words = carray(int64_at(words_of(data)), 16)
        source, stride, tokens, features, tiles, group, scratch = (
            words[3],
            words[4],
            words[5],
            words[6],
            words[7],
            words[8],
            words[9],
        )
        groups = (features + group - 1) // group
        temporary = scratch + claim(data, 2) * 2048 + 0 * MADE_OF
        state = flush(0)
        chunk = claim(data, 0)
        while chunk < words[1]:
            tile, first = chunk // groups, (chunk % groups) * group
            base = tiles + tile * features * W * SIZE
            for feature in range(first, min(features, first + group), 16):
                wide = min(16, features - feature)
                for token in range(0, W, 16):
                    there = tile * W + token
                    tall = max(0, min(16, tokens - there))
                    from_, to = source + (there * stride + feature) * SIZE, base + (feature * W + token) * SIZE
                    if wide == 16 and tall == 16:
                        transpose(from_, stride, to, W, 0, HALF, HALF)
                    else:
                        clear(temporary, 256)
                        copy_numbers(from_, stride, temporary, 16, tall, wide, HALF)
                        transpose(temporary, 16, temporary + 1024, 16, 0, HALF, HALF)
                        copy_numbers(temporary + 1024, 16, to, W, wide, 16, HALF)
            chunk = claim(data, 0)
        restore(state)

    return compiled(loop)


@njit(inline="always")
def write_tokens(strip, rows, width, out, out_stride, tokens, bias, temporary, half, half_target):
    """Write a tile's strip, (rows, width), as columns of tokens, (tokens, …) with rows at `out_stride`."""
    size, target_size = 2 if half else 4, 2 if half_target else 4
    for token in range(0, min(width, tokens), 16):
        tall = min(16, tokens - token)
        for row in range(0, rows, 16):
            wide = min(16, rows - row)
            from_, to = strip + (row * width + token) * size, out + (token * out_stride + row) * target_size
            added = bias + 4 * row if bias else 0
            if tall == 16 and wide == 16:
                transpose(from_, width, to, out_stride, added, half, half_target)
            else:
                copy_numbers(from_, width, temporary, 16, wide, 16, half)
                transpose(temporary, 16, temporary + 1024, 16, added, half, half_target)
                copy_numbers(temporary + 1024, 16, to, out_stride, tall, wide, half_target)


@functools.cache
def uncut(width: int, half: bool) -> int:
    """The inverse of `cut`, into contiguous tokens."""
    W, HALF, SIZE, MADE_OF = width, half, 2 if half else 4, threads.VERSION

    def loop(data):
        words = carray(int64_at(words_of(data)), 16)
        tiles, tokens, features, out, group, scratch = words[3], words[4], words[5], words[6], words[7], words[8]
        groups = (features + group - 1) // group
        temporary = scratch + claim(data, 2) * 2048 + 0 * MADE_OF
        chunk = claim(data, 0)
        while chunk < words[1]:
            tile, first = chunk // groups, (chunk % groups) * group
            strip = tiles + (tile * features + first) * W * SIZE
            to = out + (tile * W * features + first) * SIZE
            write_tokens(
                strip, min(group, features - first), W, to, features, tokens - tile * W, 0, temporary, HALF, HALF
            )
            chunk = claim(data, 0)

    return compiled(loop)


@functools.cache
def multiply(width: int, half: bool, short: bool) -> int:
    """Links times tiles: into tiles, or into tokens with a bias."""
    W, HALF, SHORT, SIZE, MADE_OF = width, half, short, 2 if half else 4, threads.VERSION

    def loop(data):
        words = carray(int64_at(words_of(data)), 24)
        tiles, features, columns, values = words[3], words[4], words[5], words[6]
        blocks, rows, group, strip_rows = words[8], words[9], words[10], words[11]
        scratch, out, in_tiles, tokens, bias = words[12], words[14], words[15], words[16], words[17]
        starts = carray(int64_at(words[7]), blocks * rows + 1)
        groups = (rows + group - 1) // group
        temporary = scratch + claim(data, 2) * words[13] + 0 * MADE_OF
        direct = in_tiles and not HALF
        state = flush(0)
        chunk = claim(data, 0)
        while chunk < words[1]:
            tile, first = chunk // groups, (chunk % groups) * group
            base = tiles + tile * features * W * SIZE
            last = min(rows, first + group)
            for row in range(first, last, strip_rows):
                end = min(last, row + strip_rows)
                strip = out + (tile * rows + row) * W * 4 if direct else temporary + 2048
                for block in range(blocks):
                    for each in range(row, end):
                        accumulate(
                            base, columns, values, starts[block * rows + each], starts[block * rows + each + 1],
                            strip + (each - row) * W * 4, block == 0, W, HALF, SHORT,
                        )  # fmt: skip
                if not in_tiles:
                    to = out + (tile * W * rows + row) * SIZE
                    added = bias + 4 * row if bias else 0
                    write_tokens(strip, end - row, W, to, rows, tokens - tile * W, added, temporary, False, HALF)
                elif HALF:
                    write_halves(strip, out + (tile * rows + row) * W * 2, (end - row) * W)
            chunk = claim(data, 0)
        restore(state)

    return compiled(loop)


@njit(inline="always")
def write_halves(source, target, count):
    """Floats rounded to bfloat16, ties to even."""
    froms, tos = carray(uint32_at(source), count), carray(uint16_at(target), count)
    for number in range(count):
        bits = froms[number]
        if bits & 0x7FFFFFFF > 0x7F800000:  # not a number
            tos[number] = np.uint16((bits >> 16) | 0x40)
        else:
            tos[number] = np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


@functools.cache
def sample_links(width: int, half: bool, short: bool) -> int:
    """For each link, the sum over tokens of its row in one set of tiles times its column in another."""
    W, HALF, SHORT, SIZE, MADE_OF = width, half, short, 2 if half else 4, threads.VERSION

    def loop(data):
        words = carray(int64_at(words_of(data)), 16)
        tiles, features, columns, blocks, rows = words[3], words[4], words[5], words[7], words[8]
        gradients, count, out, band = words[9], words[10], words[11], words[12]
        starts = carray(int64_at(words[6]), blocks * rows + 1)
        bands = (rows + band - 1) // band
        state = flush(0 * MADE_OF)
        chunk = claim(data, 0)
        while chunk < words[1]:
            block, first = chunk // bands, (chunk % bands) * band
            last = min(rows, first + band)
            begin, end = starts[block * rows + first], starts[block * rows + last]
            clear(out + 4 * begin, end - begin)
            for tile in range(count):
                base, row_base = tiles + tile * features * W * SIZE, gradients + tile * rows * W * SIZE
                for row in range(first, last):
                    start, stop = starts[block * rows + row], starts[block * rows + row + 1]
                    if start < stop:
                        sample(base, columns, row_base + row * W * SIZE, start, stop, out, W, HALF, SHORT)
            chunk = claim(data, 0)
        restore(state)

    return compiled(loop)


@functools.cache
def gather(half: bool) -> int:
    """Values of slots, float32 or bfloat16, as floats in the order of the links, whose number is at an address."""
    HALF, MADE_OF = half, threads.VERSION

    def loop(data):
        words = carray(int64_at(words_of(data)), 16)
        values, slots, out, step = words[3], words[4], words[6], words[7]
        links = carray(int64_at(words[5]), 1)[0] + 0 * MADE_OF
        order, result = carray(int32_at(slots), links), carray(uint32_at(out), links)
        chunk = claim(data, 0)
        while chunk < words[1]:
            first, last = chunk * step, min(links, (chunk + 1) * step)
            if HALF:
                halves = carray(uint16_at(values), 1 << 62)
                for link in range(first, last):
                    result[link] = np.uint32(halves[order[link]]) << 16
            else:
                floats = carray(uint32_at(values), 1 << 61)
                for link in range(first, last):
                    result[link] = floats[order[link]]
            chunk = claim(data, 0)

    return compiled(loop)


@functools.cache
def scatter(half: bool) -> int:
    """The inverse of `gather`; slots without a link are left alone."""
    HALF, MADE_OF = half, threads.VERSION

    def loop(data):
        words = carray(int64_at(words_of(data)), 16)
        values, slots, out, step = words[3], words[4], words[6], words[7]
        links = carray(int64_at(words[5]), 1)[0] + 0 * MADE_OF
        order = carray(int32_at(slots), links)
        chunk = claim(data, 0)
        while chunk < words[1]:
            first, last = chunk * step, min(links, (chunk + 1) * step)
            if HALF:
                for link in range(first, last):
                    write_halves(values + 4 * link, out + 2 * np.int64(order[link]), 1)
            else:
                source, result = carray(float32_at(values), 1 << 61), carray(float32_at(out), 1 << 61)
                for link in range(first, last):
                    result[order[link]] = source[link]
            chunk = claim(data, 0)

    return compiled(loop)

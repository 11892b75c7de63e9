"""Loops over links, compiled by numba. Import through `compiled.loops()`, which is None without numba.

Each has a counterpart in torch with the same result in every bit, in the module that calls it: `hashed_numbers.py`,
`link_sampling.py`, `choosing.py`. None uses fast-math flags, so that no product and sum are fused.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hf_chts.topology import hashed_numbers as numbers

_STEP = np.uint64(numbers.STEP & (2**64 - 1))
_FACTOR_1, _FACTOR_2 = (np.uint64(factor & (2**64 - 1)) for factor in numbers.FACTORS)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = (np.uint64(shift) for shift in numbers.SHIFTS)
_MANTISSA, _ONE = np.int64((1 << 52) - 1), np.int64(1023 << 52)
_U1, _U6, _U11, _U12, _U63 = (np.uint64(n) for n in (1, 6, 11, 12, 63))
_LN2, _SQRT2 = numbers.LN2, numbers.SQRT2
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7 = numbers.SERIES


def _compiled(function: Any) -> Any:
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # nowhere to keep what is compiled
        return numba.njit(nogil=True, error_model="numpy")(function)


@intrinsic
def _ones(typing: Any, word: Any) -> Any:  # the bits that are set in a word
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), code


@intrinsic
def _bits_of(typing: Any, number: Any) -> Any:  # float64 as int64
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), code


@intrinsic
def _number_of(typing: Any, bits: Any) -> Any:  # int64 as float64
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), code


@_compiled
def _hashed(seed, counter):  # type: ignore[no-untyped-def]
    x = np.uint64(counter) * _STEP + seed
    x = (x ^ (x >> _SHIFT_1)) * _FACTOR_1
    x = (x ^ (x >> _SHIFT_2)) * _FACTOR_2
    return x ^ (x >> _SHIFT_3)


@_compiled
def _fraction(seed, counter):  # type: ignore[no-untyped-def]
    return np.float64(np.int64(_hashed(seed, counter) >> _U11)) * 2.0**-53


@_compiled
def _logarithm(x):  # type: ignore[no-untyped-def]
    bits = _bits_of(x)
    exponent = (bits >> 52) - 1023
    x = _number_of((bits & _MANTISSA) | _ONE)
    large = x > _SQRT2
    exponent += np.int64(large)
    x = x * 0.5 if large else x
    s = (x - 1.0) / (x + 1.0)
    z = s * s
    total = (((((((z * _C7 + _C6) * z + _C5) * z + _C4) * z + _C3) * z + _C2) * z + _C1) * z + _C0) * s * 2.0
    return np.float64(exponent) * _LN2 + total


@_compiled
def race_keys(weights, seed, temperature, keys):  # type: ignore[no-untyped-def]
    """`hashed_numbers.race_keys` of one layer, and whether all weights are finite and >= 0."""
    fine = True
    for n in range(weights.size):
        weight = np.float64(weights[n])
        fine &= (weight >= 0) & (weight < np.inf)
        noise = (np.float64(np.int64(_hashed(seed, n) >> _U12)) + 0.5) * 2.0**-52
        key = _logarithm(weight) * temperature - _logarithm(-_logarithm(noise))
        keys[n] = key if weight != 0 else -np.inf
    return fine


@_compiled
def neighbours(positions, rows, columns, first, neighbour, degree, by_row, by_column):  # type: ignore[no-untyped-def]
    """The links of each node, in the order of nodes: rows, then columns. `positions` ascend.

    Args:
        first: int64 (rows + columns,), where the neighbours of a node begin.
        neighbour: int32 (2 * links,), rows or columns.
        degree: int64 (rows + columns,), 0.
        by_row: uint64 (rows, words), 0: the links of each row as bits.
        by_column: uint64 (columns, words), 0.
    """
    links = positions.size
    row = 0
    end = columns
    for n in range(links):
        position = positions[n]
        while position >= end:
            row += 1
            end += columns
        column = position - (end - columns)
        neighbour[n] = column
        degree[row] += 1
        degree[rows + column] += 1
        by_row[row, column >> 6] |= _U1 << np.uint64(column & 63)
        by_column[column, row >> 6] |= _U1 << np.uint64(row & 63)
    total = 0
    for node in range(rows + columns):
        first[node] = total
        total += degree[node]
    for row in range(rows):
        for n in range(first[row], first[row] + degree[row]):
            node = rows + neighbour[n]
            neighbour[first[node]] = row
            first[node] += 1
    for node in range(rows, rows + columns):
        first[node] -= degree[node]


@_compiled
def common_neighbours(first, neighbour, degree, start, other, common):  # type: ignore[no-untyped-def]
    """How many neighbours nodes `start`, `start` + 1, … share with each node of their side, link by link.

    Args:
        first, neighbour, degree: as of `neighbours`.
        other: the first node of the other side.
        common: float32 (block, nodes), 0.
    """
    for n in range(common.shape[0]):
        node = start + n
        counts = common[n]
        for link in range(first[node], first[node] + degree[node]):
            through = other + neighbour[link]
            for back in range(first[through], first[through] + degree[through]):
                counts[neighbour[back]] += np.float32(1)


@_compiled
def _node(mass, point):  # type: ignore[no-untyped-def]
    # the first with mass[node] > point
    low, high = 0, mass.size
    while low < high:
        middle = (low + high) >> 1
        if mass[middle] > point:
            high = middle
        else:
            low = middle + 1
    return low


@_compiled
def _nth_missing(of, lacking, number):  # type: ignore[no-untyped-def]
    # the place of bit `number` of those in `of` and not in `lacking`
    for word in range(of.size):
        rest = of[word] & ~lacking[word]
        ones = np.int64(_ones(rest))
        if number < ones:
            for _ in range(number):
                rest &= rest - _U1
            return (word << 6) + np.int64(_ones((rest & (~rest + _U1)) - _U1))
        number -= ones
    return 0


@_compiled
def draw_paths(first, neighbour, degree, by_row, by_column, mass, taken, k, draws, seed, rule):  # type: ignore[no-untyped-def]
    """`link_sampling._draw_paths` of one layer: mark up to k links in `taken`; return how many are still missing.

    Args:
        mass: float64 (rows + columns,), cumulative.
        rule: float64 (5,): added to the common neighbours for the weight, times them for it, the bound for each of
            them, the bound at all or 0; whether pairs of rows, and of columns, are drawn without walks, as bits.
    """
    rows, columns = by_row.shape[0], by_column.shape[0]
    total = mass[-1]
    apart = np.int64(rule[4])
    if total == 0:
        return k
    for draw in range(draws):
        if k == 0:
            break
        counter = draw * 8
        middle = _node(mass, _fraction(seed, counter) * total)
        of_rows = middle >= rows  # pairs of rows meet at a column
        if (apart >> (0 if of_rows else 1)) & 1:
            nodes = rows if of_rows else columns
            start = np.int64(_fraction(seed, counter + 1) * nodes)
            via = np.int64(_fraction(seed, counter + 2) * nodes)
            walked = False
        else:
            links = degree[middle]
            start = np.int64(neighbour[first[middle] + np.int64(_fraction(seed, counter + 1) * links)])
            via = np.int64(neighbour[first[middle] + np.int64(_fraction(seed, counter + 2) * links)])
            walked = True
        mine, theirs = (by_row[start], by_row[via]) if of_rows else (by_column[start], by_column[via])
        common = np.int64(0)
        for word in range(mine.size):
            common += np.int64(_ones(mine[word] & theirs[word]))
        links = degree[via] if of_rows else degree[rows + via]
        if common == 0 or common == links:
            continue
        bound = rule[2] * common if walked else rule[3]
        if not _fraction(seed, counter + 3) * bound < rule[0] + rule[1] * common:
            continue
        found = _nth_missing(theirs, mine, np.int64(_fraction(seed, counter + 4) * (links - common)))
        position = start * columns + found if of_rows else found * columns + start
        if not taken[position]:
            taken[position] = True
            k -= 1
    return k


@_compiled
def draw_uniformly(taken, k, draws, seed):  # type: ignore[no-untyped-def]
    """`link_sampling._draw_uniformly` of one layer."""
    for draw in range(draws):
        if k == 0:
            break
        position = np.int64(_fraction(seed, draw) * taken.size)
        if not taken[position]:
            taken[position] = True
            k -= 1
    return k

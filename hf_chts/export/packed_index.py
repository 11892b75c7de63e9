"""Where the links of a packed weight are, in fewer bytes than a bit for each weight, where a pattern allows that.

    bits       one for each weight (topology/bits.py)
    groups     under N:M: the number of each group's choice among the C(M, N) that there are, as digits to the base
               C(M, N), as many to a 64-bit word as fit. Of 2:4, 24 groups to a word: two thirds of the bits
    positions  under fan_in: the positions of the links in the order of storage, after Elias and Fano: the lower `low`
               bits of each, link after link; then a bit for each link, 1, with a 0 before it for each step by which the
               rest of its position is higher than that of the link before. At 90% about half of the bits

`K_shape` says which: (rows, columns) for bits; (rows, columns, N, M, dimension of the inputs) for groups; (rows,
columns, low, 0, 0) for positions.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from hf_chts.topology.bits import link_positions, pack_bits
from hf_chts.topology.patterns import Pattern

# A table has 2^M entries
_LARGEST_GROUP = 16
# More would save little below 99%, and let few bytes claim a huge weight: it has at most 8·2^6 weights for each byte
_MOST_LOW = 6
# Links or groups to unpack at a time, a multiple of eight
_BLOCK = 1 << 18


def header(shape: tuple[int, int], links: int, pattern: Pattern | None, transposed: bool) -> tuple[int, ...]:
    """What `K_shape` holds for a weight that is stored in this shape: of the index with the fewest bytes."""
    if pattern is None or not links:
        return shape
    if pattern.of:
        inputs = 0 if transposed else 1
        found = (*shape, pattern.kept, pattern.of, inputs)
        usable = pattern.of <= _LARGEST_GROUP and shape[inputs] % pattern.of == 0
    else:
        low = min((math.prod(shape) // links).bit_length() - 1, _MOST_LOW)
        found, usable = (*shape, low, 0, 0), low > 0
    return found if usable and size(found, links) < size(shape, links) else shape


def check(claimed: Sequence[int]) -> None:
    """Raises ValueError if `K_shape` names no index that there is; before anything of a claimed size is made."""
    if len(claimed) not in (2, 5):
        raise ValueError(f"a shape of {list(claimed)}")
    if len(claimed) == 5:
        kept, of, inputs = claimed[2:]
        groups = 0 < kept < of <= _LARGEST_GROUP and inputs in (0, 1) and claimed[inputs] % of == 0
        if not groups and not (of == inputs == 0 < kept <= _MOST_LOW):
            raise ValueError(f"a shape of {list(claimed)}")


def size(claimed: Sequence[int], links: int) -> int:
    """The bytes of the index of a weight with this `K_shape`."""
    numel = claimed[0] * claimed[1]
    if len(claimed) == 2:
        return (numel + 7) // 8
    kept, of = claimed[2:4]
    if of:
        return 8 * -(-(numel // of) // _digits(kept, of))
    return (links * kept + 7) // 8 + (links + ((numel - 1) >> kept) + 7) // 8


def packed_index(mask: Tensor, claimed: Sequence[int]) -> Tensor:
    """The index of a mask in the order of storage, bool (rows, columns): uint8 (bytes,).

    Raises:
        ValueError: the mask does not have the pattern.
    """
    if len(claimed) == 2:
        return pack_bits(mask)
    kept, of, inputs = claimed[2:]
    if not of:
        return _positions(link_positions(mask).numpy(), kept, mask.numel())
    groups = (mask if inputs else mask.t()).reshape(-1, of)
    codes = groups.numpy() @ (1 << np.arange(of))
    numbers = _tables(kept, of)[0][codes]
    if numbers.min() < 0:
        raise ValueError(f"a mask does not have {kept} links in every group of {of}")
    digits = _digits(kept, of)
    padded = np.zeros(-(-len(numbers) // digits) * digits, np.int64)
    padded[: len(numbers)] = numbers
    return torch.from_numpy((padded.reshape(-1, digits) @ _powers(kept, of)).astype("<i8").view(np.uint8))


def index_bits(index: Tensor, claimed: Sequence[int], links: int) -> Tensor:
    """The bits of a mask, as topology/bits.py has them, of an index.

    Args:
        index: uint8 (bytes,), `size` of them.
        claimed: what `K_shape` holds, which `check` let pass.
        links: how many there are to be.

    Raises:
        ValueError: the index is of no mask with so many links.
    """
    if len(claimed) == 2:
        return index
    rows, columns, kept, of, inputs = claimed
    if not of:
        mask = np.zeros(rows * columns, np.bool_)
        mask[_found(index.cpu().numpy(), kept, links, rows * columns)] = True
        return pack_bits(torch.from_numpy(mask))
    words, count = index.cpu().numpy().view("<i8"), rows * columns // of
    numbers = (words[:, None] // _powers(kept, of)) % math.comb(of, kept)
    if (words < 0).any() or numbers.reshape(-1)[count:].any():
        raise ValueError("an index that is damaged")
    if count * kept != links:
        raise ValueError(f"{count * kept} links and {links} values")
    codes = _tables(kept, of)[1][numbers.reshape(-1)[:count]]
    groups = torch.from_numpy((codes[:, None] >> np.arange(of, dtype=np.int32)) & 1 > 0)
    return pack_bits(groups.view(rows, columns) if inputs else groups.view(columns, rows).t().contiguous())


@cache
def _tables(kept: int, of: int) -> tuple[np.ndarray, np.ndarray]:
    """(the number of each group's bits among the choices, −1 for none; the bits of each number), int64 and int32."""
    codes = np.array([sum(1 << place for place in chosen) for chosen in combinations(range(of), kept)], np.int32)
    numbers = np.full(1 << of, -1, np.int64)
    numbers[codes] = np.arange(len(codes))
    return numbers, codes


@cache
def _digits(kept: int, of: int) -> int:
    """How many groups a word takes."""
    base, digits = math.comb(of, kept), 0
    while base ** (digits + 1) < 1 << 63:
        digits += 1
    return digits


@cache
def _powers(kept: int, of: int) -> np.ndarray:
    return np.array([math.comb(of, kept) ** digit for digit in range(_digits(kept, of))], np.int64)


def _positions(positions: np.ndarray, low: int, numel: int) -> Tensor:
    rest = np.zeros(len(positions) + ((numel - 1) >> low), np.bool_)
    rest[(positions >> low) + np.arange(len(positions))] = True
    parts = [
        np.packbits((positions[at : at + _BLOCK, None] >> np.arange(low)).astype(np.uint8) & 1, bitorder="little")
        for at in range(0, len(positions), _BLOCK)
    ]
    return torch.from_numpy(np.concatenate([*parts, np.packbits(rest, bitorder="little")]))


def _found(index: np.ndarray, low: int, links: int, numel: int) -> np.ndarray:
    lower = (links * low + 7) // 8
    length = links + ((numel - 1) >> low)
    rest = np.unpackbits(index[lower:], bitorder="little").view(np.bool_)
    ones = np.flatnonzero(rest)
    if len(ones) != links or (links and ones[-1] >= length):
        raise ValueError(f"{len(ones)} links and {links} values")
    positions = (ones - np.arange(links)) << low
    powers = 1 << np.arange(low)
    for at in range(0, links, _BLOCK):
        stop = min(at + _BLOCK, links)
        bits = np.unpackbits(index[at * low // 8 : (stop * low + 7) // 8], count=(stop - at) * low, bitorder="little")
        positions[at:stop] += bits.reshape(-1, low).astype(np.int64) @ powers
    if links and (positions[-1] >= numel or (np.diff(positions) <= 0).any()):
        raise ValueError("positions that do not rise within the weight")
    return positions

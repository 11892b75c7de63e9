"""Masks as bits: eight links to a byte, the first link in the lowest bit, rows end to end, zeros after the last."""

import numpy as np
import torch
from torch import Tensor

# Words of rows to compare at a time, few enough for the caches
_WORDS_AT_A_TIME = 1 << 17
# and on a device, where every operation is launched
_WORDS_AT_A_TIME_ON_DEVICE = 1 << 24


def pack_bits(mask: Tensor) -> Tensor:
    """bool tensor of n elements, any shape → uint8 (ceil(n / 8),)."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.detach().numpy(), bitorder="little"))
    flat = mask.reshape(-1).view(torch.uint8) if mask.is_contiguous() else mask.flatten().to(torch.uint8)
    if flat.numel() % 8:
        flat = torch.cat([flat, flat.new_zeros(-flat.numel() % 8)])
    columns = flat.view(-1, 8)
    packed = columns[:, 0].clone()
    for bit in range(1, 8):
        packed |= columns[:, bit] << bit
    return packed


def unpack_bits(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of `pack_bits`: uint8 (ceil(n / 8),) → bool of `shape`, n elements.

    Raises:
        ValueError: the number of bytes does not fit the shape, or a bit after the last link is set.
    """
    n = torch.Size(shape).numel()
    if packed.dtype != torch.uint8 or packed.shape != ((n + 7) // 8,):
        raise ValueError(
            f"a mask of shape {tuple(shape)} takes {(n + 7) // 8} bytes (uint8); "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    if packed.device.type == "cpu":
        bits = torch.from_numpy(np.unpackbits(packed.numpy(), bitorder="little")).view(torch.bool)
    else:
        shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
        bits = (packed[:, None] >> shifts).bitwise_and_(1).view(-1).view(torch.bool)
    if bits[n:].any():
        raise ValueError(f"a bit after the {n} links of shape {tuple(shape)} is set: the mask is damaged")
    return bits[:n].view(shape)


def pack_stack(masks: Tensor) -> Tensor:
    """Each mask of a stack as bits: bool (layers, out, in) → uint8 (layers, ceil(out·in / 8))."""
    if len(masks) == 1:
        return pack_bits(masks)[None]
    flat = masks.flatten(1)
    if flat.shape[1] % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8))
    return pack_bits(flat).view(len(masks), -1)


def unpack_stack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_stack`: uint8 (layers, bytes) → bool (layers, *shape), whatever follows the last link."""
    if packed.device.type == "cpu":
        bits = torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, bitorder="little")).view(torch.bool)
    else:
        shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
        bits = (packed[:, :, None] >> shifts).bitwise_and_(1).flatten(1).view(torch.bool)
    return bits[:, : torch.Size(shape).numel()].reshape(len(packed), *shape)


def count_bits_of_each(packed: Tensor) -> Tensor:
    """How many bits are set in each row: uint8 (layers, bytes) → int64 (layers,)."""
    if packed.device.type == "cpu":
        return torch.tensor([count_bits(row) for row in packed])
    return _bits_of_bytes(packed).sum(1, dtype=torch.int64)


def count_bits(packed: Tensor) -> int:
    """How many bits are set; uint8, any shape."""
    if packed.device.type == "cpu":
        return int.from_bytes(packed.numpy().tobytes(), "little").bit_count()
    return int(_bits_of_bytes(packed).sum(dtype=torch.int64))


def _bits_of_bytes(packed: Tensor) -> Tensor:
    # neighbouring bits are added in pairs, then the pairs, then the halves of each byte
    pairs = packed - ((packed >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0x0F


def link_positions(mask: Tensor) -> Tensor:
    """Where a mask is True, counted along its rows end to end: bool, any shape → int64 (links,), ascending."""
    flat = mask.reshape(-1)
    if flat.device.type == "cpu":
        # about three times as fast as nonzero() on the CPU
        return torch.from_numpy(np.flatnonzero(flat.numpy()))
    return flat.nonzero().squeeze(1)


def pack_rows(mask: Tensor) -> Tensor:
    """Each row as bits on its own: bool (rows, columns) → int64 (rows, ceil(columns / 64)), zeros after the last."""
    columns = mask.shape[1]
    return pack_bits(torch.nn.functional.pad(mask, (0, -columns % 64))).view(torch.int64).view(len(mask), -1)


def lacked_links(rows: Tensor, of: Tensor, lacking: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The links of row of[n] that row lacking[n] lacks.

    Args:
        rows: as of `pack_rows`.
        of, lacking: int64 (n,).
        share: float64 (n,), in [0, 1).

    Returns:
        (how many there are, the column of number floor(share·how many); arbitrary if there is none), int64 (n,) each.
    """
    step = _rows_at_a_time(rows)
    pieces = zip(of.split(step), lacking.split(step), share.split(step), strict=True)
    found = [_lacked(rows[a].bitwise_and_(rows[b].bitwise_not_()), some) for a, b, some in pieces]
    if len(found) == 1:
        return found[0]
    counts, columns = zip(*found, strict=True)
    return torch.cat(counts), torch.cat(columns)


def _lacked(words: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    until = _ones(words).cumsum(1, dtype=torch.int64)
    count = until[:, -1]
    number = (share * count).long()[:, None]
    word = torch.searchsorted(until, number, right=True).clamp_(max=words.shape[1] - 1)
    number -= until.gather(1, (word - 1).clamp_(min=0)).masked_fill_(word == 0, 0)
    places = (words.gather(1, word) >> torch.arange(64, device=words.device)).bitwise_and_(1).cumsum(1)
    place = torch.searchsorted(places, number, right=True).clamp_(max=63)
    return count, word.mul_(64).add_(place)[:, 0]


def _rows_at_a_time(rows: Tensor) -> int:
    words = _WORDS_AT_A_TIME if rows.device.type == "cpu" else _WORDS_AT_A_TIME_ON_DEVICE
    return max(1, words // rows.shape[1])


def _ones(words: Tensor) -> Tensor:
    """How many bits of each word are set: int64 → uint8 or int64, of its shape."""
    if words.device.type == "cpu" and hasattr(np, "bitwise_count"):  # from NumPy 2 on
        # it counts the bits of the absolute value of signed numbers
        return torch.from_numpy(np.bitwise_count(words.numpy().view(np.uint64)))
    # neighbouring bits are added in pairs, then the pairs, then the halves of each byte, then the bytes
    pairs = words - ((words >> 1) & 0x5555555555555555)
    fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (eights * 0x0101010101010101) >> 56

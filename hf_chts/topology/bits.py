"""Masks as bits: eight links to a byte, the first link in the lowest bit, rows end to end, zeros after the last."""

import numpy as np
import torch
from torch import Tensor

# Words of rows to compare at a time, few enough for the caches
_WORDS_AT_A_TIME = 1 << 17


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


def count_bits(packed: Tensor) -> int:
    """How many bits are set; uint8, any shape."""
    if packed.device.type == "cpu":
        return int.from_bytes(packed.numpy().tobytes(), "little").bit_count()
    # neighbouring bits are added in pairs, then the pairs, then the halves of each byte
    pairs = packed - ((packed >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return int(((fours + (fours >> 4)) & 0x0F).sum(dtype=torch.int64))


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


def common_links(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """How many links row first[n] and row second[n] share: rows as of `pack_rows`, int64 (n,) twice → int64 (n,)."""
    step = max(1, _WORDS_AT_A_TIME // rows.shape[1])
    counts = [
        _ones(rows[a].bitwise_and_(rows[b])).sum(1, dtype=torch.int64)
        for a, b in zip(first.split(step), second.split(step), strict=True)
    ]
    return torch.cat(counts) if len(counts) != 1 else counts[0]


def nth_link(rows: Tensor, share: Tensor) -> Tensor:
    """The column of link number floor(share·links) of each row.

    Args:
        rows: as of `pack_rows`, int64 (n, words), each with a link.
        share: float64 (n,), in [0, 1).

    Returns:
        int64 (n,).
    """
    until = _ones(rows).to(torch.int64).cumsum(1)
    total = until[:, -1]
    # with a share close to 1, the product may be rounded up to the total
    number = (share * total).long().minimum(total - 1)[:, None]
    word = torch.searchsorted(until, number, right=True)
    before = until.gather(1, (word - 1).clamp_(min=0)).masked_fill_(word == 0, 0)
    places = (rows.gather(1, word) >> torch.arange(64, device=rows.device)).bitwise_and_(1).cumsum(1)
    return (word * 64 + torch.searchsorted(places, number - before, right=True))[:, 0]


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

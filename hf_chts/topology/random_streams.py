"""Generators seeded by their purpose, so that a topology does not depend on other random draws."""

import hashlib

import torch


def random_stream(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator for one purpose, such as `random_stream(seed, update, layer, "regrowth")`.

    The same key gives the same numbers in any process and on any rank. Keys are hashed, so that neighbouring ones
    (update 3, layer 4 and update 4, layer 3) have nothing in common. As torch's own, the numbers depend on the device
    type.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    # manual_seed takes a signed 64-bit integer
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little", signed=True))

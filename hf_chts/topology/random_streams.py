"""Generators seeded from what they are for, so that a topology depends on nothing else that drew random numbers."""

import hashlib

import torch


def random_stream(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator for one purpose, such as `random_stream(seed, update, layer, "regrowth")`.

    The same key gives the same numbers in any process and on any rank. The keys are hashed, so that neighbouring
    ones (update 3, layer 4 and update 4, layer 3) share nothing. Numbers differ between device types, as torch's do.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    # manual_seed takes a signed 64-bit integer
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little", signed=True))

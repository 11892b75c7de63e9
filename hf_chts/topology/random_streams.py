"""Generators and seeds by their purpose, so that a topology does not depend on other random draws."""

import hashlib

import torch


def random_seed(*key: int | str) -> int:
    """A signed 64-bit seed for one purpose, such as `random_seed(seed, update, layer, "regrowth")`.

    The same key gives the same number in any process and on any rank. Keys are hashed, so that neighbouring ones
    (update 3, layer 4 and update 4, layer 3) have nothing in common.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    # manual_seed takes a signed 64-bit integer
    return int.from_bytes(digest, "little", signed=True)


def random_stream(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator with the seed of `random_seed`."""
    return generator_of(random_seed(*key), device)


def generator_of(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator. As torch's own, its numbers depend on the device type."""
    return torch.Generator(device=device).manual_seed(seed)


def number_from(generator: torch.Generator) -> int:
    """A signed 64-bit seed from a generator."""
    low, high = -(1 << 63), (1 << 63) - 1
    return int(torch.randint(low, high, (), dtype=torch.int64, device=generator.device, generator=generator))

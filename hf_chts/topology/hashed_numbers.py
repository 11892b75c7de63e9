"""Random numbers that are a function of a seed and a counter, the same on every device and in every order.

A number is the counter, times an odd constant and plus the seed, through the finalizer of SplitMix64 (Steele, Lea and
Flood, OOPSLA 2014). For one seed different counters give different numbers. `loops.py` has the same functions for
compiled loops; both use only operations whose results IEEE 754 fixes, so that they agree in every bit.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# as signed 64-bit integers, which wrap around
STEP = 0x9E3779B97F4A7C15 - (1 << 64)
FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
SHIFTS = (30, 27, 31)
LN2 = 0.6931471805599453
SQRT2 = 1.4142135623730951
_MANTISSA, _ONE = (1 << 52) - 1, 1023 << 52
# ln((1 + s)/(1 − s)) = 2s·(1 + s²/3 + s⁴/5 + …): for |s| < 0.172, these leave a relative error of 1e-13
SERIES = tuple(1 / (2 * n + 1) for n in range(8))


def seeds_on(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Signed 64-bit seeds as int64 (n, 1) on a device."""
    return torch.tensor(seeds, dtype=torch.int64).to(device, non_blocking=True)[:, None]


def unsigned(seed: int) -> np.uint64:
    """A signed 64-bit seed for compiled loops."""
    return np.uint64(seed & ((1 << 64) - 1))


def hashed(seeds: Tensor, counters: Tensor) -> Tensor:
    """64 random bits for each seed and counter: int64 that broadcast together → int64."""
    x = counters * STEP + seeds
    x.bitwise_xor_(_right(x, SHIFTS[0])).mul_(FACTORS[0])
    x.bitwise_xor_(_right(x, SHIFTS[1])).mul_(FACTORS[1])
    return x.bitwise_xor_(_right(x, SHIFTS[2]))


def fractions(bits: Tensor) -> Tensor:
    """Uniform numbers in [0, 1): int64 of random bits → float64."""
    return _right(bits, 11).to(torch.float64).mul_(2.0**-53)


def race_keys(weights: Tensor, seeds: Tensor, temperature: float | Tensor) -> Tensor:
    """Gumbel noise + T·log(weight): the highest keys are the first arrivals of a race with rates weight^T.

    Args:
        weights: (layers, n), floating point, finite and >= 0.
        seeds: int64 (layers, 1).
        temperature: T >= 0, one or float64 (layers, 1).

    Returns:
        float64 (layers, n), −∞ for a weight of 0.
    """
    bits = hashed(seeds, torch.arange(weights.shape[1], device=weights.device))
    # in (0, 1), without the ends
    noise = _right(bits, 12).to(torch.float64).add_(0.5).mul_(2.0**-52)
    del bits
    noise = logarithm(logarithm(noise).neg_())
    keys = logarithm(weights.to(torch.float64)).mul_(temperature).sub_(noise)
    return keys.masked_fill_(weights == 0, -torch.inf)


def logarithm(x: Tensor) -> Tensor:
    """The natural logarithm of float64 > 0, within a relative error of 1e-12; the same bits on every machine.

    Libraries' own logarithms differ in the last bit, and with it choices could.
    """
    bits = x.view(torch.int64)
    exponent = (bits >> 52).sub_(1023)
    x = bits.bitwise_and(_MANTISSA).bitwise_or_(_ONE).view(torch.float64)
    large = x > SQRT2
    exponent.add_(large)
    x = torch.where(large, x * 0.5, x)
    s = (x - 1).div_(x.add_(1))
    z = torch.mul(s, s, out=x)
    total = z * SERIES[-1]
    for term in SERIES[-2:0:-1]:
        total.add_(term).mul_(z)
    total.add_(SERIES[0]).mul_(s).mul_(2.0)
    return exponent.to(torch.float64).mul_(LN2).add_(total)


def _right(x: Tensor, places: int) -> Tensor:
    """Shift to the right and fill with zeros."""
    return (x >> places).bitwise_and_((1 << (64 - places)) - 1)

"""Functions of the step: sparsity, drop fraction, softness. Floats in and out, constant outside [start, end]."""

import math
from collections.abc import Callable, Mapping

from hf_chts.topology.parts import register


def _progress(step: float, start: float, end: float) -> float:
    """How far `step` is from `start` to `end`, within [0, 1]."""
    if end <= start:
        raise ValueError(f"a schedule must end after it starts; got start {start} and end {end}")
    return min(max((step - start) / (end - start), 0.0), 1.0)


@register.sparsity_schedule("linear")
def linear(step: float, start: float, end: float, initial: float, final: float) -> float:
    """From `initial` at `start` to `final` at `end`, in a straight line."""
    t = _progress(step, start, end)
    return final if t == 1 else initial + (final - initial) * t


@register.sparsity_schedule("cubic")
def cubic(step: float, start: float, end: float, initial: float, final: float) -> float:
    """final + (initial − final)·(1 − t)³: fast first, as in GMP (arXiv 1710.01878) and GraNet (arXiv 2106.10404)."""
    return final + (initial - final) * (1 - _progress(step, start, end)) ** 3


@register.sparsity_schedule("sigmoid", until=0.5, options={"k": "sigmoid_k"})
def sigmoid(step: float, start: float, end: float, initial: float, final: float, k: float = 6.0) -> float:
    """The density decay of CHTss (arXiv 2501.19107, §3.3): a logistic curve of steepness `k`, rescaled so that it is
    exactly `initial` at `start` and `final` at `end`.

    Raises:
        ValueError: k <= 0, or end <= start.
    """
    if k <= 0:
        raise ValueError(f"the steepness k of the sigmoid is {k}; it must be > 0 (the paper's is 6)")
    t = _progress(step, start, end)
    if t in (0.0, 1.0):
        return final if t else initial
    # tanh(x/2) is the logistic curve about its middle; the ends are then at ∓tanh(k/2)
    return initial + (final - initial) * (1 + math.tanh(k * (t - 0.5)) / math.tanh(k / 2)) / 2


def cosine_anneal(step: float, end: float, initial: float) -> float:
    """initial/2·(1 + cos(π·step/end)): the drop fraction of RigL (arXiv 1911.11134), 0 from `end` on."""
    return initial / 2 * (1 + math.cos(math.pi * _progress(step, 0, end)))


def elastic(step: float, end: float, final: float) -> float:
    """MEST's elastic mutation and shrinkage (EM&S, arXiv 2110.14032), as sparsities: 0.05 below `final` in the first
    0.6 of the way to `end`, 0.025 below it until `end`, and `final` from there on."""
    t = _progress(step, 0, end)
    if t == 1:
        return final
    return final - (0.05 if t < 0.6 else 0.025)


@register.sparsity_schedule("constant", starts_below=0.0)
def _constant(final: float) -> float:
    return final


@register.sparsity_schedule("elastic", starts_below=0.05)
def _elastic(step: float, end: float, final: float) -> float:
    return elastic(step, end, final)


# ζ from `initial` at step 0 to its value at `end`: (step, end, initial)
DROP_SCHEDULES: Mapping[str, Callable[[float, float, float], float]] = {
    "constant": lambda step, end, initial: initial,
    "linear": lambda step, end, initial: linear(step, 0, end, initial, 0.0),
    "cosine": cosine_anneal,
}

"""Adaptive softness: each layer finds its own softness of removal.

Links are removed by sampling those that stay with probability ∝ score^T, T = δ/(1−δ) (arXiv 2501.19107, §3.1): δ = 0
draws uniformly, δ → 1 keeps the strongest. So a *lower* δ is a *softer* removal, which explores more.

The paper leaves open how δ should follow training (its App. A). The rule here reads it off the layer's own overlap, the
share of an update's regrown links that had just been removed. Where nearly all come back, the layer is in what the
paper calls an epitopological local minimum: it removes what regrowth gives back, and nothing changes. There δ falls.
Where no more come back than chance would have it, the links that leave are let go for good, and the layer can afford to
keep what training made strong: δ rises.

The overlap of a random regrowth is not 0 but removed/missing, so what counts is the excess over that chance,

    e = max(0, (overlap − chance) / (1 − chance)),   log T ← log T + GAIN · (TARGET − e),

with δ held within [LOWEST, the config's softness_end]. With GAIN 2 and TARGET 0.2, an update that only gives back
divides T by 5, and one without any excess multiplies it by 1.5; T rests where a fifth of what is regrown comes back.
"""

import math

GAIN = 2.0
TARGET = 0.2
LOWEST = 0.1


def temperature(softness: float) -> float:
    """T = δ/(1−δ) of a softness δ in [0, 1)."""
    return softness / (1 - softness)


def chance_overlap(removed: int, regrown: int, missing: int) -> float:
    """The overlap that regrowth would have if it drew uniformly: removed over missing links, before the regrowth.

    Args:
        removed: links removed in the update, to be replaced.
        regrown: links added.
        missing: missing links after the update.
    """
    candidates = missing + regrown
    return removed / candidates if candidates else 0.0


def adapted(softness: float, overlap: float, chance: float, highest: float) -> float:
    """The softness δ for a layer's next update.

    Args:
        softness: δ of this update, in [0, 1).
        overlap: share of the regrown links that had just been removed, in [0, 1].
        chance: the overlap of a uniform regrowth, in [0, 1].
        highest: the highest δ, in [0, 1).
    """
    lowest = min(LOWEST, highest)
    excess = max(0.0, (overlap - chance) / (1 - chance)) if chance < 1 else 0.0
    start = max(softness, lowest)
    if start == 0:  # highest is 0: always uniform
        return 0.0
    logit = math.log(temperature(start)) + GAIN * (TARGET - excess)
    return min(max(1 / (1 + math.exp(-logit)), lowest), highest)

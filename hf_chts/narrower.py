"""How narrow a model is that has a given number of weights: arithmetic, without a model."""

import math
from collections.abc import Callable


def narrower(
    width: int, ffn: int, wanted: float, count: Callable[[int, int], int], *, heads: int, step: int
) -> tuple[int, int]:
    """Width and ffn of a model of the same depth and number of heads that has as many weights as are wanted.

    The width is the multiple of `step` nearest to that at which width and ffn, in proportion, give the number. What is
    then missing or too much is made up by ffn, so that the number is right within half of what one more of ffn adds.

    Args:
        width, ffn: of the model to start from.
        wanted: the number of weights.
        count: the weights of a model by its width and ffn: quadratic where both grow in proportion, linear in ffn.
        heads: of its attention; for the message alone.
        step: what the width has to be a multiple of, so that it is shared out among the heads.

    Raises:
        ValueError: there is no such model.
    """
    one, two, three = (count(times * width, times * ffn) for times in (1, 2, 3))
    square = (three - 2 * two + one) / 2  # the coefficients of count(x·width, x·ffn)
    linear = two - one - 3 * square
    rest = one - square - linear
    scale = (math.sqrt(max(0.0, linear**2 - 4 * square * (rest - wanted))) - linear) / (2 * square)
    narrow = max(step, round(width * scale / step) * step)
    least = count(narrow, 1)
    each = count(narrow, 2) - least
    if each <= 0:
        raise ValueError(
            "the number of weights does not grow with the inner width of the feed-forward layers, so that no narrower "
            "model can be found: choose an architecture with dense feed-forward layers"
        )
    found = 1 + round((wanted - least) / each)
    if found < 1:
        raise ValueError(
            f"a model with {heads} heads cannot be so narrow as to have {wanted:,.0f} weights, where width {width} has "
            f"{one:,}: take fewer heads, a wider model or a lower sparsity"
        )
    return narrow, found

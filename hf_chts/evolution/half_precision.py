"""Weights of half precision are refused, whoever holds them."""

from collections.abc import Mapping

import torch
from torch import Tensor


def refuse_half_precision(weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming the layer, where a weight that an optimizer is to step on is float16.

    Its steps overflow and vanish: Adam's ε of 1e-8 is 0 in float16, and losses grow into the thousands before they are
    infinite.
    """
    for name, weight in weights.items():
        if weight.dtype == torch.float16:
            raise ValueError(
                f"the weight of {name} is float16, in which optimizer steps overflow or vanish: load the model with "
                "dtype=torch.float32, with fp16=True for half-precision products if they are wanted, or with "
                "dtype=torch.bfloat16"
            )

"""Refuse to train float16 weights, under any engine."""

from collections.abc import Mapping

import torch
from torch import Tensor


def refuse_half_precision(weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming the layer, if the optimizer would step on a float16 weight.

    Steps overflow or vanish in float16: Adam's ε of 1e-8 is 0 there, and losses grow into the thousands before they
    become infinite.
    """
    for name, weight in weights.items():
        if weight.dtype == torch.float16:
            raise ValueError(
                f"the weight of {name} is float16, in which optimizer steps overflow or vanish: load the model with "
                "dtype=torch.float32, with fp16=True for half-precision products if they are wanted, or with "
                "dtype=torch.bfloat16"
            )

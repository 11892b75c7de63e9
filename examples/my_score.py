"""A regrowth score of your own: missing links between the strongest neurons come first.

accelerate launch train_llama.py --parts examples/my_score.py --method set --regrowth strength --regrowth_choice hard
"""

from torch import Tensor

from hf_chts import register


@register.regrowth("strength")
def strength(mask: Tensor, weight: Tensor) -> Tensor:
    """Sum of |w| over an output's links times that over an input's, for missing links; all (out, in)."""
    size = weight.abs()
    return (size.sum(1, keepdim=True) * size.sum(0, keepdim=True)).masked_fill(mask, 0)

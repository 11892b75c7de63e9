"""A linear layer whose missing links stay missing: identity forward on the weight, gradient masked inside autograd."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class _KeepLinks(torch.autograd.Function):
    """Identity on the weight; the gradient off the mask becomes 0.

    The weight itself is 0 off the mask by invariant, so the forward needs no product and no copy. Because the mask
    acts inside autograd, whoever uses the gradient later (clipping, DDP, sharded engines) sees the masked one.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, dense_gradient: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.dense_gradient = dense_gradient
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        if ctx.dense_gradient is not None:
            ctx.dense_gradient.add_(grad)
        # not a product: 0 · inf would put NaN off the mask
        return torch.where(mask, grad, 0), None, None


def keep_links(weight: Tensor, mask: Tensor, dense_gradient: Tensor | None = None) -> Tensor:
    """`weight` unchanged, with a gradient that is 0 where `mask` (bool, same shape) is False.

    The gradient that there would be without the mask is added to `dense_gradient`, where one is given, in backward.
    """
    return _KeepLinks.apply(weight, mask, dense_gradient)


class MaskedLinear(nn.Linear):
    """`nn.Linear` with a bool buffer `mask` (out_features, in_features); True is a link.

    The buffer is not persistent, so state dicts have the keys of a plain `nn.Linear`. Weight, gradient and optimizer
    moments are 0 off the mask at every step.
    """

    mask: Tensor
    # where the dense gradient of the current step adds up over its micro-batches; None on steps that do not need it
    dense_gradient: Tensor | None = None

    @staticmethod
    def convert(linear: nn.Linear, mask: Tensor) -> "MaskedLinear":
        """Turn `linear` itself into a MaskedLinear, and set its weights off the mask to 0.

        The module stays the same object with the same parameter, so hooks, references and optimizers made before keep
        working.

        Raises:
            ValueError: the mask is not bool or not of the weight's shape.
            TypeError: `linear` is a subclass of `nn.Linear`, whose forward would be lost.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"only nn.Linear itself can be masked, got {type(linear).__name__}")
        linear.register_buffer("mask", torch.zeros_like(linear.weight, dtype=torch.bool), persistent=False)
        linear.__class__ = MaskedLinear
        assert isinstance(linear, MaskedLinear)
        linear.set_mask(mask)
        return linear

    def revert(self) -> nn.Linear:
        """Turn the layer back into a plain, dense `nn.Linear`; the weights stay as they are."""
        del self._buffers["mask"]
        self.__dict__.pop("dense_gradient", None)
        self._non_persistent_buffers_set.discard("mask")
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Take over a topology, in place, and set the weights off it to 0.

        Raises:
            ValueError: the mask is not bool or not of the weight's shape.
        """
        if mask.dtype != torch.bool or mask.shape != self.weight.shape:
            raise ValueError(
                f"the mask of this layer is bool {tuple(self.weight.shape)}; got {mask.dtype} {tuple(mask.shape)}"
            )
        # in place: compiled graphs and CUDA graphs hold on to the buffer
        self.mask.copy_(mask)
        self.weight.masked_fill_(~self.mask, 0)

    @property
    def links(self) -> int:
        return int(torch.count_nonzero(self.mask))

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, keep_links(self.weight, self.mask, self.dense_gradient), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, links={self.links}"

"""Masked layers: dense weights that stay 0 where there is no link.

The weight is 0 off the mask, so only its gradient needs masking. A hook on the weight does that once for each backward
pass, wherever in the model the weight was used: some models multiply with `layer.weight` themselves. A hook stays on
its tensor. Where another tensor is used in the forward (functional_call, the gathered weight of FSDP2), `keep_links`
masks the gradient inside autograd instead; it covers only the layer's own forward.
"""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from hf_chts.layers.links import MaskedStorage
from hf_chts.layers.sparse_layer import Accumulator, SparseLayer

_Layer = TypeVar("_Layer", bound="MaskedLayer")


class _KeepLinks(torch.autograd.Function):
    """Identity on the weight; the gradient off the mask becomes 0.

    The weight itself is 0 off the mask by invariant, so the forward needs no product and no copy. Because the mask
    acts inside autograd, whoever uses the gradient later (clipping, DDP, sharded engines) sees the masked one.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, dense_gradient: Accumulator | None) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.dense_gradient = dense_gradient
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        if ctx.dense_gradient is not None:
            ctx.dense_gradient.add_(_value(grad))
        # not a product: 0 · inf would put NaN off the mask
        return torch.where(mask, grad, 0), None, None


def keep_links(weight: Tensor, mask: Tensor, dense_gradient: Accumulator | None = None) -> Tensor:
    """`weight` unchanged, with a gradient that is 0 where `mask` (bool, same shape) is False.

    The backward pass adds the unmasked gradient to `dense_gradient` if there is one, except inside torch.func's
    transforms, whose gradients are results and reach no optimizer.
    """
    if torch._C._are_functorch_transforms_active():
        # The same result, since the weight is 0 off the mask, at the cost of a pass over it. Transforms can batch and
        # differentiate it in both modes. An autograd function that they accept would make every call four times as
        # expensive, and torch.compile loses its backward inside torch.func.grad.
        return torch.where(mask, weight, 0)
    primal, tangent = forward_ad.unpack_dual(weight)
    kept = _KeepLinks.apply(primal, mask, dense_gradient)
    # by hand, since autograd accepts only views as tangents of a function that returns a view
    return kept if tangent is None else forward_ad.make_dual(kept, torch.where(mask, tangent, 0))


class MaskedLayer(SparseLayer):
    """A layer with one weight of two dimensions and a bool buffer `mask` of the weight's shape; True is a link.

    The buffer is not persistent, so state dicts have the keys of the plain layer. Weight, gradient and optimizer
    moments are 0 off the mask at every step; while its storage `trains_missing`, the weight alone is. `mask`,
    `dense_gradient` and moments have the weight's layout.
    """

    parameter_name = "weight"
    other_name = "link_values"

    weight: Tensor
    mask: Tensor
    # the hook that masks the gradient, and a weak reference to the weight it is on: engines replace weights and want
    # their memory back
    _hook: RemovableHandle | None = None
    _hooked: Callable[[], Tensor | None] = staticmethod(lambda: None)

    @classmethod
    def convert(cls: type[_Layer], layer: nn.Module, mask: Tensor) -> _Layer:
        """Turn `layer` itself into a masked layer, and set its weights off the mask, bool (out, in), to 0.

        The module stays the same object with the same parameter, so hooks, references and optimizers made before keep
        working.

        Raises:
            ValueError: the mask is not bool (out, in).
            TypeError: `layer` is not of the class `plain`; the forward of a subclass would be lost.
        """
        converted = cls.attach(layer, mask)
        converted.set_mask(mask)
        return converted

    @classmethod
    def attach(cls: type[_Layer], layer: nn.Module, mask: Tensor) -> _Layer:
        """As `convert`, but weights off the mask stay as they are, so that `revert` restores the layer."""
        cls.check(layer)
        plain = type(layer)
        layer.__class__ = cls
        assert isinstance(layer, cls)
        try:
            layer.storage = MaskedStorage(layer, mask)
        except BaseException:
            layer.__class__ = plain  # type: ignore[assignment]
            raise
        try:
            layer.mask_by_hook()
        except BaseException:
            layer.revert()
            raise
        return layer

    def revert(self) -> nn.Module:
        """Turn the layer back into a plain, dense one; the weights stay as they are."""
        del self._buffers["mask"], self.storage
        self.__dict__.pop("dense_gradient", None)
        if self._hook is not None:
            self._hook.remove()
            del self._hook, self._hooked  # the class attributes take their place again
        self._non_persistent_buffers_set.discard("mask")
        self.__class__ = self.plain  # type: ignore[assignment]
        return self

    @property
    def parameter(self) -> Tensor:
        return self.weight

    def masked_weight(self) -> Tensor:
        """The weight for the forward; its gradient is masked exactly once."""
        weight = self.weight
        if self.storage.trains_missing:
            return weight
        return weight if self._is_hooked(weight) else keep_links(weight, self.mask, self.dense_gradient)

    def _is_hooked(self, weight: Tensor) -> bool:
        """Whether the hook masks the gradient of this tensor, which functional_call may have put in the weight's place.

        The weights of `nn.DataParallel`'s replicas are made of the weight, which has the hook.
        """
        hooked = self._hooked()
        return hooked is not None and (weight is hooked or getattr(self, "_is_replica", False))

    def mask_by_hook(self) -> None:
        """Put the hook that masks the gradient on the weight, if it is not there.

        A frozen weight takes no hook, and needs none; the hook on a weight that FSDP2 has split would never be called.
        """
        if self._is_hooked(self.weight) or not self.weight.requires_grad or hasattr(self.weight, "device_mesh"):
            return
        if self._hook is not None:  # on a weight that has been replaced
            self._hook.remove()
        self._hook = self.weight.register_hook(self._mask_gradient)
        self._hooked = weakref.ref(self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # if `.to` and the like swap parameters instead of writing to them, weak references to them are not allowed
        swaps = self._hook is not None and torch.__future__.get_swap_module_params_on_conversion()
        if swaps:
            assert self._hook is not None
            self._hook.remove()
            del self._hook, self._hooked
            if not self.weight._backward_hooks:  # an empty list of hooks would be swapped as well
                self.weight._backward_hooks = None
        try:
            return super()._apply(fn, recurse)
        finally:
            if swaps:
                self.mask_by_hook()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_hook", "_hooked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.mask_by_hook()  # a copy of a tensor has none of its hooks

    def _mask_gradient(self, grad: Tensor) -> Tensor:
        if self.storage.trains_missing:
            return grad
        if self.dense_gradient is not None:
            self.dense_gradient.add_(_value(grad))
        return torch.where(self.mask, grad, 0)


def _value(grad: Tensor) -> Tensor:
    """A gradient detached from autograd in both modes, for accumulators."""
    return forward_ad.unpack_dual(grad.detach()).primal

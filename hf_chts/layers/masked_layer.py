"""What masked layers have in common: missing links stay missing.

The weight is 0 off the mask, so the forward takes it as it is; what has to be masked is its gradient. A hook on the
weight does that, once for a backward pass and wherever in the model the weight was used: some models multiply with
`layer.weight` themselves. A hook stays on the tensor that it was put on. Where another takes its place in the forward
(functional_call, the gathered weight of FSDP2), `keep_links` masks the gradient on its way instead, which is all that
the layer can see of it.
"""

import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from hf_chts.layers.links import LinkStorage, MaskedStorage
from hf_chts.layers.plain_weight import check_plain

_Layer = TypeVar("_Layer", bound="MaskedLayer")


class Accumulator(Protocol):
    """What a gradient can be added to: a tensor, or what stands for one."""

    def add_(self, grad: Tensor, /) -> Any: ...


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

    The gradient that there would be without the mask is added to `dense_gradient`, where one is given, in backward;
    not inside torch.func's transforms, whose gradients are their results and reach no optimizer.
    """
    if torch._C._are_functorch_transforms_active():
        # The same function, since the weight is 0 off the mask, and a pass over it that a training step does without.
        # Transforms batch it and differentiate it in either mode, any number of times. An autograd function for them
        # would cost every call four times as much, and torch.compile forgets its backward inside torch.func.grad.
        return torch.where(mask, weight, 0)
    primal, tangent = forward_ad.unpack_dual(weight)
    kept = _KeepLinks.apply(primal, mask, dense_gradient)
    # not a jvp of the function: of one that returns a view, autograd takes no tangent but a view
    return kept if tangent is None else forward_ad.make_dual(kept, torch.where(mask, tangent, 0))


class MaskedLayer(nn.Module):
    """A layer with one weight of two dimensions and a bool buffer `mask` of the weight's shape; True is a link.

    The buffer is not persistent, so state dicts have the keys of the plain layer. Weight, gradient and optimizer
    moments are 0 off the mask at every step.

    `mask`, `dense_gradient` and moments have the weight's layout. The topology is always (out, in): `topology`,
    `set_mask`, and `matrix` for the rest.

    Attributes:
        storage: the owner of the links; changes of them go through it.
        plain: the class that the layer is made from.
        transposed: whether the weight lies as (in, out).
    """

    plain: ClassVar[type[nn.Module]]
    transposed: ClassVar[bool] = False

    weight: Tensor
    mask: Tensor
    storage: LinkStorage
    # where the dense gradient of the current step adds up over its micro-batches; None on steps that do not need it
    dense_gradient: Accumulator | None = None
    # the hook that masks the gradient, and the weight that it is on: by a weak reference, since whoever splits weights
    # puts others in their place and wants the memory back
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
        """As `convert`, but that weights off the mask stay: `revert` gives back all that was there."""
        check_plain("the layer", layer)
        if type(layer) is not cls.plain:
            raise TypeError(f"only {cls.plain.__name__} itself can become a {cls.__name__}, got {type(layer).__name__}")
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
            del self._hook, self._hooked  # those of the class are seen again
        self._non_persistent_buffers_set.discard("mask")
        self.__class__ = self.plain  # type: ignore[assignment]
        return self

    @classmethod
    def matrix(cls, tensor: Tensor) -> Tensor:
        """Switch between the weight's layout and (out, in). Its own inverse; only Conv1D transposes."""
        return tensor.t() if cls.transposed else tensor

    @property
    def topology(self) -> Tensor:
        """The mask, bool (out, in): a view of the live buffer, to read."""
        return self.storage.topology

    def set_mask(self, mask: Tensor) -> None:
        """Take over a topology, bool (out, in), in place, and set the weights off it to 0.

        Raises:
            ValueError: the mask is not bool (out, in).
        """
        self.storage.replace(mask)

    @property
    def links(self) -> int:
        """The number of links."""
        return self.storage.count

    def masked_weight(self) -> Tensor:
        """The weight, for the forward, with a gradient that is masked once."""
        weight = self.weight
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
        if self._hook is not None:  # on a weight that is no longer the layer's
            self._hook.remove()
        self._hook = self.weight.register_hook(self._mask_gradient)
        self._hooked = weakref.ref(self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # where `.to` and the like swap parameters instead of writing into them, nothing may refer to one weakly
        swaps = self._hook is not None and torch.__future__.get_swap_module_params_on_conversion()
        if swaps:
            assert self._hook is not None
            self._hook.remove()
            del self._hook, self._hooked
            if not self.weight._backward_hooks:  # an empty list would be swapped too, without its effect
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
        if self.dense_gradient is not None:
            self.dense_gradient.add_(_value(grad))
        return torch.where(self.mask, grad, 0)


def _value(grad: Tensor) -> Tensor:
    """A gradient without what it could be differentiated by, in either mode: what adds it up has no derivative."""
    return forward_ad.unpack_dual(grad.detach()).primal

"""What sparse layers have in common, however their links are stored."""

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from hf_chts.layers.links import LinkStorage
from hf_chts.layers.plain_weight import check_plain


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype that autocast, if it is on, gives to products on this kind of device."""
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # autocast does not know of the meta device
        return None
    return torch.get_autocast_dtype(kind)


class Accumulator(Protocol):
    """What a gradient can be added to: a tensor, or what stands for one."""

    def add_(self, grad: Tensor, /) -> Any: ...


class SparseLayer(nn.Module):
    """A linear layer some of whose weights are links, and the others missing: 0, and untrained.

    The topology is always (out, in). The weight may lie as (in, out), and so do gradients and whatever else has its
    layout; `matrix` switches.

    Attributes:
        storage: the owner of the links; changes of them go through it.
        plain: the class that the layer is made from.
        transposed: whether the weight lies as (in, out).
        dense_gradient: where the dense gradient of the current step adds up over its micro-batches; None on steps that
            do not need it.
    """

    plain: ClassVar[type[nn.Module]]
    transposed: ClassVar[bool] = False

    #: the names of the trained parameter here, and in layers of the other storage
    parameter_name: ClassVar[str]
    other_name: ClassVar[str]

    storage: LinkStorage
    dense_gradient: Accumulator | None = None

    @classmethod
    def check(cls, layer: nn.Module) -> None:
        """Raises ValueError or TypeError where `layer` cannot become one of these."""
        check_plain("the layer", layer)
        if type(layer) is not cls.plain:  # the forward of a subclass would be lost
            raise TypeError(f"only {cls.plain.__name__} itself can become a {cls.__name__}, got {type(layer).__name__}")

    def revert(self) -> nn.Module:
        """Turn the layer back into a plain, dense one with the same weights."""
        raise NotImplementedError

    @classmethod
    def matrix(cls, tensor: Tensor) -> Tensor:
        """Switch between the weight's layout and (out, in). Its own inverse; only Conv1D transposes."""
        return tensor.t() if cls.transposed else tensor

    @property
    def parameter(self) -> Tensor:
        """The trained parameter, of the shape `storage.parameter_shape`; an engine may hold a part of it."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # weights of a checkpoint of the other storage, whose topology has been restored
        mine, other = f"{prefix}{self.parameter_name}", f"{prefix}{self.other_name}"
        if other in state_dict and mine not in state_dict:
            state_dict[mine] = self.storage.converted(state_dict.pop(other))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def mask_by_hook(self) -> None:
        """Have missing links stay missing in training, where that is not so by itself."""

    @property
    def topology(self) -> Tensor:
        """bool (out, in), True where there is a link; to read."""
        return self.storage.topology

    @property
    def links(self) -> int:
        """The number of links."""
        return self.storage.count

    def set_mask(self, mask: Tensor) -> None:
        """Take over a topology, bool (out, in); the weights of links that go become 0, and links that come are 0.

        Raises:
            ValueError: the mask is not bool (out, in).
        """
        self.storage.replace(mask)


def rename_parameter(layer: nn.Module, old: str, new: str, parameter: torch.nn.Parameter) -> None:
    """Put a parameter under another name in the place of one, so that optimizers number parameters as before."""
    parameters = [(new, parameter) if name == old else (name, p) for name, p in layer._parameters.items()]
    layer._parameters.clear()
    layer._parameters.update(parameters)

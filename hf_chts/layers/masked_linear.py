"""The masked layers of torch and transformers, and which plain layer becomes which."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_chts.layers.masked_layer import MaskedLayer


class MaskedLinear(MaskedLayer, nn.Linear):
    """`nn.Linear` with a mask (out_features, in_features); see `MaskedLayer`."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.masked_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, links={self.links}"


class MaskedConv1D(MaskedLayer, Conv1D):
    """transformers' `Conv1D`, the linear layer of GPT-2, with a mask (in, out), as its weight; see `MaskedLayer`."""

    plain = Conv1D
    transposed = True

    def forward(self, input: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, input.view(-1, input.size(-1)), self.masked_weight())
        return rows.view(*input.size()[:-1], self.nf)

    def __repr__(self) -> str:
        return f"MaskedConv1D(nf={self.nf}, nx={self.nx}, links={self.links})"


PLAIN_LAYERS = (nn.Linear, Conv1D)


class _OfSubclass(MaskedLayer):
    """A masked layer made of a model's own subclass of a linear layer; it keeps that class's forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weight, masked = self.weight, self.masked_weight()
        if masked is weight:
            return self.plain.forward(self, *args, **kwargs)
        self._parameters["weight"] = masked  # type: ignore[assignment]
        try:
            return self.plain.forward(self, *args, **kwargs)
        finally:
            self._parameters["weight"] = weight  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:  # its class is in no module
        return _empty, (self.plain,), self.__getstate__()


def masked_class(layer: nn.Module) -> type[MaskedLayer]:
    """The class that masks a layer of `PLAIN_LAYERS` or a subclass of one, with the forward that the layer has."""
    return type(layer) if isinstance(layer, MaskedLayer) else _masked_class(type(layer))


def _masked_class(kind: type[nn.Module]) -> type[MaskedLayer]:
    base: type[MaskedLayer] = MaskedConv1D if issubclass(kind, Conv1D) else MaskedLinear
    if kind is base.plain:
        return base
    if kind not in _MADE:
        _MADE[kind] = type(f"Masked{kind.__name__}", (_OfSubclass, base, kind), {"plain": kind})
    return _MADE[kind]


_MADE: dict[type[nn.Module], type[MaskedLayer]] = {}


def _empty(kind: type[nn.Module]) -> MaskedLayer:
    made = _masked_class(kind)
    return made.__new__(made)

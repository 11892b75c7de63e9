"""The masked layers of torch and transformers, and which plain layer becomes which."""

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


def masked_class(layer: nn.Module) -> type[MaskedLayer]:
    """The class that masks a layer of `PLAIN_LAYERS` or a subclass of one."""
    return MaskedConv1D if isinstance(layer, Conv1D) else MaskedLinear

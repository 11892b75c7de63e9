"""LoRA on the links of a sparse layer alone, so that merging it keeps the mask and loses nothing."""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor
from torch.nn import functional

from hf_chts.layers.sparse_layer import SparseLayer


class MaskedLora(lora.Linear):
    """A low-rank change of a sparse layer's weight, set to 0 where the layer has no link.

    Ordinary LoRA adds B·A, which is dense: what is kept of it in a sparse layer is a small part, and another function
    than the one that was trained. Here the forward pass has B·A on the links alone (as SparsePEFT of arXiv 2410.03750
    has it), which is what merging gives. It makes one layer's B·A dense at a time, forward and backward.
    """

    _mask: Tensor | None = None  # once the layer inside has become dense

    def __init__(self, base_layer: SparseLayer, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        self.fan_in_fan_out = base_layer.transposed  # PEFT sets it for its own layers alone

    def keep_mask(self) -> None:
        """Remember the links of the layer inside, before it becomes dense."""
        layer: Any = self.get_base_layer()
        self._mask = layer.matrix(layer.topology).clone()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds, in the layout of the layer's weight."""
        layer: Any = self.get_base_layer()
        mask = layer.matrix(layer.topology) if self._mask is None else self._mask
        return torch.where(mask, super().get_delta_weight(adapter), 0.0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        layer: Any = self.get_base_layer()
        result = layer(x)
        for name in self.active_adapters:
            if name in self.lora_A:
                change = layer.matrix(self.get_delta_weight(name))
                inputs = self._cast_input_dtype(self.lora_dropout[name](x), change.dtype)
                result = result + functional.linear(inputs, change).to(result.dtype)
        return result


def masked(config: LoraConfig) -> LoraConfig:
    """The same config, whose adapters of sparse layers are masked; those of other layers are ordinary ones."""
    config._register_custom_module({SparseLayer: MaskedLora})
    return config

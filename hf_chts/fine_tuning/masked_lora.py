"""LoRA on the links of a sparse layer alone, so that merging it keeps the mask and loses nothing."""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
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

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add to the links what adapters add, however the links are stored.

        Args:
            safe_merge: refuse what is not finite.
            adapter_names: None: the active ones.

        Raises:
            ValueError: as `safe_merge` says.
        """
        if not isinstance(self.get_base_layer(), SparseLayer):  # it has become dense
            super().merge(safe_merge, adapter_names)
            return
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                self._add(name, 1, safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take away again what `merge` has added."""
        if not isinstance(self.get_base_layer(), SparseLayer):
            super().unmerge()
            return
        while self.merged_adapters:
            self._add(self.merged_adapters.pop(), -1, False)

    @torch.no_grad()
    def _add(self, name: str, sign: int, finite: bool) -> None:
        layer: Any = self.get_base_layer()
        change = self.get_delta_weight(name)
        if finite and not torch.isfinite(change).all():
            raise ValueError(f"what adapter {name!r} adds is NaN or infinite: merge one of an earlier checkpoint")
        layer.parameter.add_(layer.storage.values(layer.matrix(change)).to(layer.parameter.dtype), alpha=sign)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapters on the links take one for the whole batch: leave adapter_names out")
        if self.disable_adapters or self.merged:
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

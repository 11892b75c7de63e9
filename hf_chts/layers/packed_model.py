"""What a model whose layers are packed for inference does not do: train, and be saved as other models are."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from hf_chts.layers.packed_layer import PackedLayer
from hf_chts.layers.packed_products import dense_product
from hf_chts.layers.sparse_layer import autocast_dtype


class DenseLinear(nn.Linear):
    """A dense layer of a packed model, such as its head, which has one token at a time go through at once."""

    def forward(self, input: Tensor) -> Tensor:
        gradient = torch.is_grad_enabled() and input.requires_grad
        special = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        seen = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        if not (seen or gradient or special or autocast_dtype(input.device.type)):
            found = dense_product(input, self.weight, self.bias)
            if found is not None:
                return found
        return functional.linear(input, self.weight, self.bias)


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def check_not_packed(model: nn.Module, what: str) -> None:
    """Raises ValueError if a model is packed for inference, which cannot be what `what` says, as "exported"."""
    if any(isinstance(module, PackedLayer) for module in model.modules()):
        raise ValueError(f"this model is packed for inference, and cannot be {what}. {_remedy(model)}")


def for_inference(model: nn.Module) -> None:
    """Make a model with packed layers one for inference alone; everything that would change or save it raises."""
    model.eval().requires_grad_(False)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = DenseLinear
    above = {
        prefix
        for name in packed_layers(model)
        for prefix in (name[:end] for end in range(len(name)) if end == 0 or name[end] == ".")
    }
    for name in above:
        module = model.get_submodule(name)
        module.__dict__["train"] = functools.partial(_train, module)
    if above:
        model.__dict__["save_pretrained"] = functools.partial(_refuse_to_save, model)


def _train(module: Any, mode: bool = True) -> Any:
    # of the whole before any part of it, so that none is left in the other mode
    if mode:
        raise ValueError(f"this model is packed for inference, and cannot be trained. {_remedy(module)}")
    return type(module).train(module, False)


def _refuse_to_save(model: Any, *args: Any, **kwargs: Any) -> Any:
    check_not_packed(model, "saved")


def _remedy(model: Any) -> str:
    source = getattr(model, "name_or_path", None) or "directory"
    return (
        f"Load it with load_sparse({str(source)!r}), without compute='sparse', and train it or write it with "
        "export_sparse; to copy it, copy the directory that it was loaded from"
    )

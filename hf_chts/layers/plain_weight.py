"""Detect layers whose weight is not a plain tensor: quantized, or computed from others before each forward."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from hf_chts.layers.wrappers import named_originals


def check_plain(name: str, layer: nn.Module) -> None:
    """Raises ValueError, naming layer and reason, if masking the weight would not mask what is trained."""
    if is_parametrized(layer):
        tensor, (first, *_) = next(iter(layer.parametrizations.items()))  # type: ignore[operator, union-attr]
        kind = f"torch.nn.utils.parametrize ({type(first).__name__})"
        remedy = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {tensor!r})"
        raise ValueError(_refusal(name, tensor, kind, remedy))
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            tensor = hook._tensor_name
            kind, remedy = (
                f"torch.nn.utils.prune ({type(hook).__name__})",
                f"torch.nn.utils.prune.remove(layer, {tensor!r})",
            )
        elif isinstance(hook, WeightNorm | SpectralNorm):
            function = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            tensor = hook.name
            kind, remedy = f"torch.nn.utils.{function}", f"torch.nn.utils.remove_{function}(layer, {tensor!r})"
        else:
            continue
        raise ValueError(_refusal(name, tensor, kind, remedy))
    weight = layer._parameters.get("weight")
    if weight is not None and (why := why_not_plain(weight)):
        raise ValueError(
            f"the weight of {name} is {why}, so a mask can hold neither its zeros nor its gradient: train the "
            "model without quantization and quantize what is exported, or leave the layer dense (exclude_modules)"
        )


def check_places(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raises ValueError, naming the layer, if a layer has been removed from the model or replaced."""
    found = set(model.modules())
    for name, layer in layers.items():
        if layer not in found:
            instead = named_originals(model).get(name)
            kind = "nothing" if instead is None else f"a {type(instead).__name__}"
            raise ValueError(
                f"{name} is no longer in the model: {kind} is in its place, as libraries of quantization put it, and "
                "knows nothing of the mask. Change layers before the model is made sparse, or quantize what is exported"
            )


def why_not_plain(weight: Tensor) -> str | None:
    """Why a weight is not plain floating-point numbers, as part of a sentence; None if it is."""
    if kind := own_class(weight):
        return f"of the class {kind} and no plain tensor"
    if not weight.is_floating_point() or weight.element_size() == 1:
        return f"stored as {str(weight.dtype).removeprefix('torch.')}"
    return None


def own_class(tensor: Tensor) -> str | None:
    """The class and library of a tensor whose class is not torch's own, such as a quantized one; else None.

    Weights that FSDP2 or DeepSpeed splits count as torch's own if their local parts are.
    """
    kind = type(getattr(tensor, "_local_tensor", tensor) if hasattr(tensor, "device_mesh") else tensor)
    return None if kind in (Tensor, nn.Parameter) else f"{kind.__name__} ({kind.__module__.partition('.')[0]})"


def _refusal(name: str, tensor: str, kind: str, remedy: str) -> str:
    return (
        f"{kind} holds the {tensor} of {name} and works it out anew before each forward, so that a mask would not hold "
        f"in training: call {remedy} first, or leave the layer dense (target_modules)"
    )

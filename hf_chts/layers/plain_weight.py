"""Layers whose weight or bias is no parameter of their own, but worked out from others before each forward."""

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def check_plain(name: str, layer: nn.Module) -> None:
    """Raises ValueError, naming the layer and what holds its weight, where a mask could not reach what is trained."""
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


def _refusal(name: str, tensor: str, kind: str, remedy: str) -> str:
    return (
        f"{kind} holds the {tensor} of {name} and works it out anew before each forward, so that a mask would not hold "
        f"in training: call {remedy} first, or leave the layer dense (target_modules)"
    )

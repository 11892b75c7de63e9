"""What the layers of a model get as inputs over some batches, for topologies that are chosen by it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def input_norms(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The norm of each input feature of some layers, over all tokens of some batches.

    Only sums of squares are kept, so that any number of tokens takes the same memory.

    Args:
        model: it is called with each batch, in evaluation mode.
        layers: modules of the model that take (…, in), by name.
        batches: arguments of the model, on its device. Tokens whose `attention_mask` (B, L) is 0 do not count.

    Returns:
        ‖x_j‖₂, float32 (in,) on the CPU, by layer name; summed in float32 over a batch and in float64 over batches.

    Raises:
        ValueError: no token has come to a layer.
    """
    sums: dict[str, Tensor] = {}
    counted: list[Tensor | None] = [None]

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = (args[0] if args else next(iter(kwargs.values()))).detach()
            mask = counted[0]
            if mask is not None and inputs.shape[:-1] == mask.shape:
                inputs = inputs[mask]
            squares = inputs.reshape(-1, inputs.shape[-1]).float().square().sum(0).to("cpu", torch.float64)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            counted[0] = None if mask is None else mask.bool()
            model(**batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    for name in layers:
        if name not in sums:
            raise ValueError(
                f"no calibration input has come to {name}: take more, or leave the layer dense (exclude_modules)"
            )
    return {name: sums[name].sqrt().to(torch.float32) for name in layers}

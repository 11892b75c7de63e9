"""The layers of a model become masked ones, all of them or none."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_chts.layers.masked_layer import MaskedLayer
from hf_chts.layers.masked_linear import masked_class
from hf_chts.sharding.partitions import weight_shape, zero_off_mask


def convert_layers(layers: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> dict[str, MaskedLayer]:
    """Turn layers into masked ones with these topologies, bool (out, in), by name; see `MaskedLayer.convert`.

    Where something is raised on the way, all of them are as they were. Weights are set to 0 last, when all else is
    done, and were tried before to be such as can be set.
    """
    for layer in layers.values():
        weight = layer.get_parameter("weight")
        if not weight.is_meta:
            # the same write with nothing to write
            zero_off_mask(weight, torch.ones(weight_shape(weight), dtype=torch.bool, device=weight.device))
    converted: dict[str, MaskedLayer] = {}
    try:
        for name, layer in layers.items():
            converted[name] = masked_class(layer).attach(layer, masks[name])
        for masked in converted.values():
            zero_off_mask(masked.weight, masked.mask)
    except BaseException:
        for masked in converted.values():
            masked.revert()
        raise
    return converted

"""The layers of a model become masked ones, all of them or none."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_chts.layers.masked_layer import MaskedLayer
from hf_chts.layers.masked_linear import masked_class
from hf_chts.sharding.partitions import held_part


def convert_layers(layers: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> dict[str, MaskedLayer]:
    """Turn layers into masked ones with these topologies, bool (out, in), by name; see `MaskedLayer.convert`.

    Where something is raised on the way, all of them are as they were. Weights are set to 0 last, when all else is
    done, and were tried before to be such as can be set.
    """
    for layer in layers.values():
        weight = layer.get_parameter("weight")
        if not weight.is_meta:
            # the same write with nothing to write
            part, _ = held_part(weight)
            part.masked_fill_(torch.zeros_like(part, dtype=torch.bool), 0)
    converted: dict[str, MaskedLayer] = {}
    try:
        for name, layer in layers.items():
            converted[name] = masked_class(layer).attach(layer, masks[name])
        for name, masked in converted.items():
            masked.set_mask(masks[name])
    except BaseException:
        for masked in converted.values():
            masked.revert()
        raise
    return converted

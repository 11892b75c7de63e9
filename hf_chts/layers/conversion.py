"""Turn the layers of a model into sparse ones, all of them or none."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_chts.layers.linked_layer import LinkedLayer, linked_class
from hf_chts.layers.masked_layer import MaskedLayer
from hf_chts.layers.masked_linear import masked_class
from hf_chts.sharding.partitions import held_part


def link_layers(
    layers: Mapping[str, nn.Module], topologies: Mapping[str, Tensor], slots: Mapping[str, int], dense_bytes: int
) -> dict[str, LinkedLayer]:
    """Turn layers into linked ones, in place.

    Args:
        topologies: bool (out, in) by layer name.
        slots: the number of slots by layer name.
        dense_bytes: how many bytes of a weight are made dense at a time.

    Raises:
        ValueError, TypeError: a layer cannot be converted; nothing was changed.
    """
    kinds = {name: linked_class(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        kinds[name].check(layer)
    return {
        name: kinds[name].attach(layer, topologies[name], slots[name], dense_bytes) for name, layer in layers.items()
    }


def convert_layers(layers: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> dict[str, MaskedLayer]:
    """Turn layers into masked ones with these topologies, bool (out, in), by name; see `MaskedLayer.convert`.

    If anything is raised, all layers are as they were: weights are set to 0 last, and whether they can be written to is
    checked first.
    """
    for layer in layers.values():
        weight = layer.get_parameter("weight")
        if not weight.is_meta:
            # raises if the weight cannot be written to; changes nothing
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

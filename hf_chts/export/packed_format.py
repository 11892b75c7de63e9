"""Packed checkpoints: how a sparse weight is stored, as an index and the values of its links.

A weight `K` becomes three tensors of a safetensors file:

    K_bits    uint8 (bytes,)          the mask in the order in which the weight is stored: a bit for each weight as in
                                      topology/bits.py, or a smaller index that a pattern allows (packed_index.py)
    K_values  its own dtype (links,)  the weights of the links in the same order, zeros among them too
    K_shape   int64 (2,) or (5,)      the shape of the weight as it is stored, and which index that is

Version 1 has bits alone; files of models without a pattern are still written as version 1.

A transposed weight stays (in, out), and so do its bits; its key is in the list "transposed" of the file's metadata.
All other tensors are stored as they are. There is no masks.safetensors.
"""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_chts.topology.patterns import Pattern

METHOD = "hf_chts"  # the quant_method in config.json
VERSION = 2
KINDS = ("bits", "values", "shape")

# config.json has it as transformers_weights, which is meant for a file name. Without hf_chts transformers fails and
# shows it; the loader in packed_loading.py puts the name of the index in its place.
NOTE = (
    "these weights are packed by hf_chts. To load them, install it (pip install hf_chts) and `import hf_chts` before "
    "from_pretrained, or make a plain directory with `hf-chts unpack DIR OUT`"
)

# elements per block: their positions fit the processor's cache
_BLOCK = 1 << 17


def pack_values(weight: Tensor, mask: Tensor) -> Tensor:
    """The weights of the links, bit for bit: floats and bool of one shape → (links,)."""
    numbers, flat = _numbers(weight), mask.reshape(-1).numpy()
    blocks = range(0, flat.size, _BLOCK)
    parts = [numbers[begin : begin + _BLOCK][np.flatnonzero(flat[begin : begin + _BLOCK])] for begin in blocks]
    return torch.from_numpy(np.concatenate(parts)).view(weight.dtype)


def unpack_weight(bits: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack_values`: uint8 (ceil(n / 8),) and (links,) → a weight of `shape`, 0 off the links.

    The bits must have as many links as there are values.
    """
    if bits.device.type != "cpu":
        shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
        flat = (bits[:, None] >> shifts).bitwise_and_(1).view(-1).bool()[: shape[0] * shape[1]]
        return values.new_zeros(shape[0] * shape[1]).masked_scatter_(flat, values).view(shape)
    weight = torch.empty(shape, dtype=values.dtype)
    numbers, given, packed = _numbers(weight), _numbers(values), bits.numpy()
    used = 0
    for begin in range(0, numbers.size, _BLOCK):
        block = numbers[begin : begin + _BLOCK]
        block.fill(0)
        mask = np.unpackbits(packed[begin // 8 : (begin + _BLOCK) // 8], count=block.size, bitorder="little")
        # numpy is twice as fast on booleans as on bytes, and ten times as fast as torch's masked_scatter_
        links = np.flatnonzero(mask.view(np.bool_))
        block[links] = given[used : used + links.size]
        used += links.size
    return weight


def version_for(pattern: Pattern | None) -> int:
    """The version of the format for a model with this pattern; the earliest, so that earlier hf_chts read it."""
    return 1 if pattern is None else VERSION


def known_version(version: Any) -> bool:
    """Whether this hf_chts reads a version."""
    return type(version) is int and 1 <= version <= VERSION


def metadata(transposed: Iterable[str], pattern: Pattern | None = None) -> dict[str, str]:
    """The metadata of a shard in which the weights with these keys are transposed."""
    said = {"version": version_for(pattern), "transposed": sorted(transposed)}
    return {"format": "pt", METHOD: json.dumps(said)}


def packed_config(config: dict[str, Any], pattern: Pattern | None = None) -> dict[str, Any]:
    """The contents of config.json for a packed directory, made from the plain directory's."""
    settings = {"quant_method": METHOD, "version": version_for(pattern)}
    return config | {"quantization_config": settings, "transformers_weights": NOTE}


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `packed_config`; a plain config stays as it is."""
    if not is_packed(config):
        return config
    return {key: value for key, value in config.items() if key not in ("quantization_config", "transformers_weights")}


def is_packed(config: dict[str, Any]) -> bool:
    """Whether these contents of config.json belong to a packed directory."""
    settings = config.get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD


def _numbers(tensor: Tensor) -> Any:
    """The elements as a flat numpy array of integers of the same size; numpy has no bfloat16."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(-1).view(integers).numpy()

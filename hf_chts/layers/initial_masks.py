"""The topologies that layers start with."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_chts.config import SparsityConfig
from hf_chts.files.reading import LazyMapping
from hf_chts.layers.shares import layer_links
from hf_chts.topology.allocation import block_links
from hf_chts.topology.bits import pack_bits, unpack_bits
from hf_chts.topology.parts import INITIAL_TOPOLOGIES
from hf_chts.topology.patterns import under_pattern
from hf_chts.topology.random_streams import random_seed, random_stream


def initial_masks(
    shapes: Mapping[str, tuple[int, int]],
    weights: Mapping[str, Tensor],
    config: SparsityConfig,
    calibration: Mapping[str, Tensor] | Tensor | None = None,
    blocks: Mapping[str, int] | None = None,
) -> Mapping[str, Tensor]:
    """The initial topologies of layers of these shapes (out, in), by name: bool, on the CPU.

    With links storage they are kept as bits, and each is unpacked when it is read.

    Args:
        weights: (out, in) by name; see `layer_links`.
        calibration: inputs of every layer, (samples, in) by name, for an initial topology that needs them; or those of
            the model, (samples, features), for all layers.
        blocks: the number of blocks of rows that get topologies of their own, by layer name; 1 where absent.

    Raises:
        ValueError: calibration inputs are needed and missing, or do not fit; or the registered function returns
            something other than a mask with the right number of links.
    """
    links = layer_links(shapes, config.initial_sparsity, config, weights)
    part = INITIAL_TOPOLOGIES[config.initial_topology]
    masks: dict[str, Tensor] = {}
    as_bits = config.storage == "links"
    for index, (name, (rows, columns)) in enumerate(shapes.items()):
        n = (blocks or {}).get(name, 1)
        parts = []
        for block in range(n):
            # drawn on the CPU, so that it is the same on every device
            purpose = f"initial topology {block}" if block else "initial topology"
            generator = random_stream(config.topology_seed, 0, index, purpose)
            shape = (rows * (block + 1) // n - rows * block // n, columns)
            number = block_links(links[name], block, n)
            given = {"out_features": shape[0], "in_features": shape[1], "links": number, "generator": generator}
            if "inputs" in part.needs:
                given["inputs"] = _calibration_inputs(name, shape, config, calibration)
            drawn = part.check(part(config, **given), shape, number)
            if config.links_pattern is not None:
                seed = random_seed(config.topology_seed, 0, index, f"pattern {block}")
                drawn = under_pattern(drawn.cpu(), config.links_pattern, number, seed)
            parts.append(drawn)
        mask = (parts[0] if n == 1 else torch.cat(parts)).cpu()
        masks[name] = pack_bits(mask) if as_bits else mask
    return LazyMapping(lambda name: unpack_bits(masks[name], shapes[name]), masks) if as_bits else masks


def check_links(
    shapes: Mapping[str, tuple[int, int]],
    weights: Mapping[str, Tensor],
    config: SparsityConfig,
    blocks: Mapping[str, int],
) -> None:
    """Raises ValueError, naming the layer, if a layer or an output under fan_in would have no link, or no whole groups
    of inputs."""
    if (pattern := config.links_pattern) is not None:
        for name, (_, columns) in shapes.items():
            try:
                pattern.width(columns)
            except ValueError as error:
                raise ValueError(f"{name} {shapes[name]}: {error}") from error
    for sparsity in (config.sparsity, config.initial_sparsity):
        for name, links in layer_links(shapes, sparsity, config, weights).items():
            if pattern is not None and links < shapes[name][0]:
                raise ValueError(
                    f"{name} {shapes[name]} would have {links} links at sparsity {sparsity}, fewer than outputs, and "
                    f"under pattern {pattern.name!r} each has one: lower the sparsity, or leave it out of "
                    "target_modules"
                )
            if links < blocks.get(name, 1):
                raise ValueError(
                    f"{name} {shapes[name]} would have no link left at sparsity {sparsity}: lower the sparsity, or "
                    "leave it out of target_modules"
                )


def _calibration_inputs(
    name: str, shape: tuple[int, int], config: SparsityConfig, calibration: Mapping[str, Tensor] | Tensor | None
) -> Tensor:
    if isinstance(calibration, Tensor):
        return calibration
    inputs = (calibration or {}).get(name)
    if inputs is None or inputs.dim() != 2 or inputs.shape[1] != shape[1]:
        given = "nothing" if inputs is None else str(tuple(inputs.shape))
        raise ValueError(
            f"the initial topology {config.initial_topology!r} needs calibration inputs (samples, {shape[1]}) for "
            f"{name}, got {given}: pass sparsify(model, config, calibration={{layer name: inputs}}), or those of the "
            "model, calibration=inputs, or choose another initial_topology"
        )
    return inputs

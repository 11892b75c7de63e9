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
from hf_chts.topology.patterns import highest, under_pattern
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
        weights: (out, in) by name; read for an initial topology that is made of them, and see `layer_links`.
        calibration: inputs of every layer, (samples, in) by name, or their norms over the samples, (in,), for an
            initial topology that needs them; or one tensor for all layers.
        blocks: the number of blocks of rows that get topologies of their own, by layer name; 1 where absent.

    Raises:
        ValueError: calibration inputs are needed and missing, or do not fit; the registered function refuses what it
            is given, or returns something other than a mask with the right number of links.
    """
    links = layer_links(shapes, config.initial_sparsity, config, weights, blocks)
    part = INITIAL_TOPOLOGIES[config.initial_topology]
    masks: dict[str, Tensor] = {}
    as_bits = config.storage == "links"
    for index, (name, (rows, columns)) in enumerate(shapes.items()):
        n = (blocks or {}).get(name, 1)
        parts = []
        seen: dict[str, Tensor] = {}
        for need in part.needs & _CALIBRATION.keys():
            seen[need] = _CALIBRATION[need](name, columns, config, calibration)
        weight = _on_cpu(weights[name]) if "weight" in part.needs else None
        for block in range(n):
            # drawn on the CPU, so that it is the same on every device
            purpose = f"initial topology {block}" if block else "initial topology"
            generator = random_stream(config.topology_seed, 0, index, purpose)
            of_block = slice(rows * block // n, rows * (block + 1) // n)
            shape = (of_block.stop - of_block.start, columns)
            number = block_links(links[name], block, n)
            given = {"out_features": shape[0], "in_features": shape[1], "links": number, "generator": generator, **seen}
            if weight is not None:
                given["weight"] = weight[of_block]
            given["choose"] = highest(config.links_pattern, number, generator)
            try:
                drawn = part.check(part(config, **given), shape, number)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
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
        for name, links in layer_links(shapes, sparsity, config, weights, blocks).items():
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


def _on_cpu(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.promote_types(weight.dtype, torch.float32))


def _inputs(
    name: str, features: int, config: SparsityConfig, calibration: Mapping[str, Tensor] | Tensor | None
) -> Tensor:
    """Calibration inputs, (samples, features) of this layer, or of the model."""
    if isinstance(calibration, Tensor):
        return calibration
    inputs = (calibration or {}).get(name)
    if inputs is None or inputs.dim() != 2 or inputs.shape[1] != features:
        raise _refused(name, f"(samples, {features})", inputs, config)
    return inputs


def _input_norms(
    name: str, features: int, config: SparsityConfig, calibration: Mapping[str, Tensor] | Tensor | None
) -> Tensor:
    """The norm of each input feature over the samples, float32 (features,), summed in float64."""
    inputs = calibration if isinstance(calibration, Tensor) else (calibration or {}).get(name)
    if inputs is None or inputs.dim() not in (1, 2) or inputs.shape[-1] != features:
        raise _refused(name, f"(samples, {features}) or their norms ({features},)", inputs, config)
    norms = inputs.detach().to("cpu", torch.float64)
    if inputs.dim() == 2:
        norms = torch.linalg.vector_norm(norms, dim=0)
    if not (torch.isfinite(norms).all() and (norms >= 0).all() and norms.any()):
        raise ValueError(
            f"the calibration inputs of {name} have norms from {norms.min()} to {norms.max()} over the samples; they "
            "must be finite and not all 0: leave out the samples that are not finite, or take more"
        )
    return norms.to(torch.float32)


# by what a part may need of calibration inputs
_CALIBRATION = {"inputs": _inputs, "input_norms": _input_norms}


def _refused(name: str, wanted: str, inputs: Tensor | None, config: SparsityConfig) -> ValueError:
    given = "nothing" if inputs is None else str(tuple(inputs.shape))
    return ValueError(
        f"the initial topology {config.initial_topology!r} needs calibration inputs {wanted} for {name}, got {given}: "
        "pass sparsify(model, config, calibration={layer name: inputs}), or those of the model, calibration=inputs, or "
        "choose another initial_topology (on the command line there are inputs for wanda alone, with --init weights)"
    )

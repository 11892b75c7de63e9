"""sparsify(): which projections of a model become masked layers, with which topology; and dense again."""

import re
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_chts.config import SparsityConfig
from hf_chts.layers.coupling import couplings
from hf_chts.layers.masked_linear import MaskedLinear
from hf_chts.topology.allocation import allocate, links_at
from hf_chts.topology.initial import (
    bipartite_receptive_field,
    bipartite_scale_free,
    bipartite_small_world,
    correlated,
    erdos_renyi,
)
from hf_chts.topology.random_streams import random_stream

_HANDLE = "_hf_chts_sparse_model"


class SparseModel:
    """A handle on a model that `sparsify` has patched.

    Attributes:
        model: the model itself.
        config: the SparsityConfig it was patched with.
        layers: its masked layers by module name, in the model's order.
    """

    def __init__(self, model: nn.Module, config: SparsityConfig, layers: dict[str, MaskedLinear]) -> None:
        self.model = model
        self.config = config
        self.layers = layers

    @staticmethod
    def of(model: nn.Module) -> "SparseModel | None":
        """The handle of a patched model, or None."""
        return getattr(model, _HANDLE, None)

    def sparsity(self) -> float:
        """The share of missing links over all masked layers; 0 for a dense model."""
        total = sum(layer.mask.numel() for layer in self.layers.values())
        return 1 - self.links() / total if total else 0.0

    def links(self) -> int:
        """The number of links of all masked layers."""
        return sum(layer.links for layer in self.layers.values())

    def masks(self) -> dict[str, Tensor]:
        """The masks by layer name: bool (out_features, in_features), the live buffers."""
        return {name: layer.mask for name, layer in self.layers.items()}

    def check(self) -> None:
        """Raises RuntimeError, naming the layer, if a weight is not 0 where there is no link."""
        for name, layer in self.layers.items():
            strays = int(torch.count_nonzero(layer.weight.detach().masked_fill(layer.mask, 0)))
            if strays:
                raise RuntimeError(
                    f"{name} has {strays} weights that are not 0 off its mask: something wrote to the weight past the "
                    "mask. Assign weights before sparsify(), or call set_mask(layer.mask) after writing"
                )

    def unsparsify(self) -> nn.Module:
        """Make every layer a plain dense `nn.Linear` again, with the weights as they are, and return the model."""
        for layer in self.layers.values():
            layer.revert()
        self.layers = {}
        if hasattr(self.model, _HANDLE):
            delattr(self.model, _HANDLE)
        self._ignore_masks_in_ddp()
        return self.model

    def _ignore_masks_in_ddp(self) -> None:
        # DDP would send every mask from rank 0 at each forward. Ranks agree on masks by construction.
        mine = {f"{name}.mask" for name in self.layers}
        others = [
            name for name in getattr(self.model, "_ddp_params_and_buffers_to_ignore", []) if not name.endswith(".mask")
        ]
        self.model._ddp_params_and_buffers_to_ignore = [*others, *sorted(mine)]  # type: ignore[assignment]


def sparsify(
    model: nn.Module,
    config: SparsityConfig,
    *,
    masks: dict[str, Tensor] | None = None,
    calibration: Mapping[str, Tensor] | None = None,
) -> SparseModel:
    """Make the target layers of `model` sparse, in place.

    Args:
        model: any model; by default the linear projections of its decoder blocks are the target.
        config: what to patch and with which initial topology; with method "dense" nothing is.
        masks: topologies to take over instead of drawing initial ones, bool (out, in) by layer name, for exactly the
            target layers.
        calibration: for the initial topology "correlated", the inputs of every target layer over some samples,
            (samples, in_features) by layer name.

    Returns:
        The handle; also found again with `SparseModel.of(model)`.

    Raises:
        ValueError: nothing matches, a weight is shared or too small, the model is sparse already, or `masks` do not
            fit. Everything is checked before the model is touched.
    """
    if SparseModel.of(model) is not None:
        raise ValueError("the model is sparse already: call unsparsify() on its handle, SparseModel.of(model)")
    targets = {} if config.is_dense else find_targets(model, config)
    if config.percolation and targets:
        couplings(cast(PreTrainedModel, model), list(targets))  # refuses architectures whose coupling is not known
    if masks is None:
        masks = initial_masks({name: linear.weight for name, linear in targets.items()}, config, calibration)
    else:
        _check_masks(masks, targets)
    layers = {name: MaskedLinear.convert(linear, masks[name]) for name, linear in targets.items()}
    sparse = SparseModel(model, config, layers)
    # not a submodule: plain attribute, so it is in no state dict
    object.__setattr__(model, _HANDLE, sparse)
    sparse._ignore_masks_in_ddp()
    return sparse


def find_targets(model: nn.Module, config: SparsityConfig) -> dict[str, nn.Linear]:
    """The layers that `config` makes sparse, by name, in the model's order.

    Raises:
        ValueError: see `sparsify`.
    """
    linears = {name: module for name, module in model.named_modules() if name and isinstance(module, nn.Linear)}
    targets = (
        _block_projections(model, linears)
        if config.target_modules is None
        else _matching(linears, config.target_modules)
    )
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for name, linear in targets.items():
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"{name} is a {type(linear).__name__}, not a plain nn.Linear: leave it out of target_modules"
            )
        shared = users.get(id(linear.weight), [])
        if len(shared) > 1:
            raise ValueError(
                f"{name} shares its weight with {[s for s in shared if s != name + '.weight']}: a mask would "
                "reach those too. Untie them, or leave it out of target_modules"
            )
        if not linear.weight.requires_grad:
            raise ValueError(f"{name} is frozen: unfreeze it, or leave it out of target_modules")
        for sparsity in (config.sparsity, config.initial_sparsity):
            if not links_at(linear.weight.numel(), sparsity):
                raise ValueError(
                    f"{name} {tuple(linear.weight.shape)} would have no link left at sparsity {sparsity}: lower the "
                    "sparsity, or leave it out of target_modules"
                )
    return targets


def initial_masks(
    weights: Mapping[str, Tensor], config: SparsityConfig, calibration: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The initial topologies of layers with these weights (out, in), by name: bool, on the weights' devices.

    Raises:
        ValueError: the initial topology is "correlated" and calibration inputs are missing or do not fit.
    """
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    sparsities = allocated(shapes, config.initial_sparsity, config)
    masks = {}
    for index, (name, shape) in enumerate(shapes.items()):
        # drawn on the CPU, so that it is the same whatever device the model is on
        generator = random_stream(config.topology_seed, 0, index, "initial topology")
        if config.initial_topology == "correlated":
            inputs = _calibration_inputs(name, shape, calibration)
            mask = correlated(inputs, shape[0], sparsities[name], generator=generator)
        else:
            mask = _INITIAL[config.initial_topology](*shape, sparsities[name], config, generator)
        masks[name] = mask.to(weights[name].device)
    return masks


def allocated(shapes: Mapping[str, tuple[int, int]], sparsity: float, config: SparsityConfig) -> dict[str, float]:
    """The sparsity of each layer where that of all is `sparsity`."""
    if config.allocation == "uniform":
        return dict.fromkeys(shapes, sparsity)  # each layer to its own nearest link, whatever the total
    return allocate(shapes, sparsity, config.allocation)


_INITIAL: dict[str, Callable[[int, int, float, SparsityConfig, torch.Generator], Tensor]] = {
    "erdos_renyi": lambda out, inn, sparsity, config, generator: erdos_renyi(out, inn, sparsity, generator=generator),
    "bipartite_receptive_field": lambda out, inn, sparsity, config, generator: bipartite_receptive_field(
        out, inn, sparsity, r=config.brf_r, degree_distribution=config.brf_degrees, generator=generator
    ),
    "bipartite_small_world": lambda out, inn, sparsity, config, generator: bipartite_small_world(
        out, inn, sparsity, beta=config.bsw_beta, generator=generator
    ),
    "bipartite_scale_free": lambda out, inn, sparsity, config, generator: bipartite_scale_free(
        out,
        inn,
        sparsity,
        equal_partition=config.bsf_equal_partition,
        resort=config.bsf_resort,
        generator=generator,
    ),
}


def _calibration_inputs(name: str, shape: tuple[int, int], calibration: Mapping[str, Tensor] | None) -> Tensor:
    inputs = (calibration or {}).get(name)
    if inputs is None or inputs.dim() != 2 or inputs.shape[1] != shape[1]:
        given = "nothing" if inputs is None else str(tuple(inputs.shape))
        raise ValueError(
            f"the initial topology 'correlated' needs calibration inputs (samples, {shape[1]}) for {name}, got "
            f"{given}: pass sparsify(model, config, calibration={{layer name: inputs}}), or choose another "
            "initial_topology"
        )
    return inputs


def _block_projections(model: nn.Module, linears: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Linear layers inside the repeated blocks of the model, which transformers keeps in `nn.ModuleList`s."""
    blocks = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not isinstance(module[0], nn.Linear)
    )
    found = {name: linear for name, linear in linears.items() if name.startswith(blocks)} if blocks else {}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layers inside a list of blocks: name the layers in target_modules. "
            f"Its linear layers: {_some(linears)}"
        )
    return found


def _matching(linears: dict[str, nn.Linear], patterns: list[str]) -> dict[str, nn.Linear]:
    found: set[str] = set()
    for pattern in patterns:
        matches = {
            name for name in linears if name == pattern or name.endswith("." + pattern) or re.fullmatch(pattern, name)
        }
        if not matches:
            raise ValueError(
                f"target_modules has {pattern!r}, which matches no linear layer: give a suffix such as 'q_proj', or a "
                f"regular expression that matches a whole name. Linear layers: {_some(linears)}"
            )
        found |= matches
    return {name: linear for name, linear in linears.items() if name in found}


def _check_masks(masks: dict[str, Tensor], targets: dict[str, nn.Linear]) -> None:
    if set(masks) != set(targets):
        missing, extra = sorted(set(targets) - set(masks)), sorted(set(masks) - set(targets))
        raise ValueError(
            f"the masks are not those of this model and config: missing {missing[:3]}, unknown {extra[:3]}"
        )
    for name, mask in masks.items():
        shape = tuple(targets[name].weight.shape)
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(f"the mask of {name} is {mask.dtype} {tuple(mask.shape)}; the layer takes bool {shape}")


def _some(linears: dict[str, nn.Linear]) -> str:
    names = list(linears)
    return ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "") if names else "none"

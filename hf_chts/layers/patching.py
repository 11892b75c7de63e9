"""sparsify(): which projections of a model become masked layers, with which topology; and dense again."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from hf_chts.config import SparsityConfig
from hf_chts.layers.coupling import couplings
from hf_chts.layers.initial_masks import check_links, initial_masks
from hf_chts.layers.masked_layer import MaskedLayer
from hf_chts.layers.masked_linear import PLAIN_LAYERS, masked_class
from hf_chts.layers.partitions import strays, weight_shape, whole_weight
from hf_chts.layers.plain_weight import check_plain
from hf_chts.layers.shares import Lazy, head_blocks, matching, overrides, some
from hf_chts.layers.wrappers import added_by_adapters, copied_by_adapters, named_originals, original_name, unwrap

_HANDLE = "_hf_chts_sparse_model"


class SparseModel:
    """A handle on a model that `sparsify` has patched.

    Attributes:
        model: the model itself, without wrappers.
        config: the SparsityConfig it was patched with.
        layers: its masked layers by their name in the model, in the model's order.
        blocks: into how many blocks of rows, each with a topology of its own, a layer is cut; by name, 1 where absent.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SparsityConfig,
        layers: dict[str, MaskedLayer],
        blocks: Mapping[str, int] | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.layers = layers
        self.blocks = dict(blocks or {})

    @staticmethod
    def of(model: nn.Module) -> "SparseModel | None":
        """The handle of a patched model, wrapped or not, or None."""
        return getattr(unwrap(model), _HANDLE, None)

    def sparsity(self) -> float:
        """The share of missing links over all masked layers; 0 for a dense model."""
        total = sum(layer.mask.numel() for layer in self.layers.values())
        return 1 - self.links() / total if total else 0.0

    def links(self) -> int:
        """The number of links of all masked layers."""
        return sum(layer.links for layer in self.layers.values())

    def masks(self) -> dict[str, Tensor]:
        """The masks by layer name: bool (out_features, in_features), views of the live buffers."""
        return {name: layer.topology for name, layer in self.layers.items()}

    def copies(self) -> dict[str, MaskedLayer]:
        """Masked layers in the model that are none of `layers`, by name: copies of them, as PEFT's modules_to_save.

        They keep their links, and nobody evolves them.
        """
        mine = {id(layer) for layer in self.layers.values()}
        return {
            name: module
            for name, module in named_originals(self.model).items()
            if isinstance(module, MaskedLayer) and id(module) not in mine
        }

    def check(self) -> None:
        """Raises RuntimeError, naming the layer, if a weight is not 0 where there is no link.

        Raises:
            ValueError: something else has taken hold of a weight.
        """
        for name, layer in (self.layers | self.copies()).items():
            check_plain(name, layer)
            count = strays(layer.weight, layer.mask)
            if count:
                raise RuntimeError(
                    f"{name} has {count} weights that are not 0 off its mask: something wrote to the weight past the "
                    "mask. Assign weights before sparsify(), or call set_mask(layer.topology) after writing"
                )

    def unsparsify(self) -> nn.Module:
        """Make every layer a plain dense one again, with the weights as they are, and return the model.

        Raises:
            ValueError: something else has taken hold of a weight. Nothing is changed then.
        """
        layers = self.layers | self.copies()
        for name, layer in layers.items():
            check_plain(name, layer)
        for layer in layers.values():
            layer.revert()
        self.layers = {}
        if hasattr(self.model, _HANDLE):
            delattr(self.model, _HANDLE)
        self.ignore_masks_in_ddp(self.model)
        return self.model

    def ignore_masks_in_ddp(self, model: nn.Module) -> None:
        """Tell DDP, which is to wrap `model`, the model or something around it, to leave the masks alone.

        It would send every mask from rank 0 at each forward. Ranks agree on masks by construction.
        """
        masked = [name for name, module in model.named_modules() if isinstance(module, MaskedLayer)]
        others = [
            name for name in getattr(model, "_ddp_params_and_buffers_to_ignore", []) if not name.endswith(".mask")
        ]
        model._ddp_params_and_buffers_to_ignore = [*others, *(f"{name}.mask" for name in sorted(masked))]  # type: ignore[assignment]


def sparsify(
    model: nn.Module,
    config: SparsityConfig,
    *,
    masks: dict[str, Tensor] | None = None,
    calibration: Mapping[str, Tensor] | None = None,
) -> SparseModel:
    """Make the target layers of `model` sparse, in place.

    Args:
        model: any model, wrapped or not; by default the linear projections of its decoder blocks are the target.
        config: what to patch and with which initial topology; with method "dense" nothing is.
        masks: topologies to take over instead of drawing initial ones, bool (out, in) by layer name, for exactly the
            target layers.
        calibration: for the initial topology "correlated", the inputs of every target layer over some samples,
            (samples, in_features) by layer name.

    Returns:
        The handle; also found again with `SparseModel.of(model)`.

    Raises:
        ValueError: nothing matches, a weight is shared, frozen, too small or held by something else, the blocks have
            projections that are no layers, the model is sparse already, or `masks` do not fit. Everything is checked
            before the model is touched.
    """
    model = unwrap(model)
    if SparseModel.of(model) is not None:
        raise ValueError("the model is sparse already: call unsparsify() on its handle, SparseModel.of(model)")
    targets = {} if config.is_dense else find_targets(model, config)
    if config.percolation and targets:
        couplings(cast(PreTrainedModel, model), list(targets))  # refuses architectures whose coupling is not known
    shapes = {name: _matrix_shape(layer) for name, layer in targets.items()}
    weights = Lazy(lambda name: _matrix(targets[name]), targets)
    blocks = head_blocks(model, shapes) if config.per_head and targets else {}
    if targets:
        overrides(targets, config)
        check_links(shapes, weights, config, blocks)
    if masks is None:
        masks = initial_masks(shapes, weights, config, calibration, blocks)
    else:
        _check_masks(masks, shapes)
    layers = {name: masked_class(layer).convert(layer, masks[name]) for name, layer in targets.items()}
    sparse = SparseModel(model, config, layers, blocks)
    # not a submodule: plain attribute, so it is in no state dict
    object.__setattr__(model, _HANDLE, sparse)
    sparse.ignore_masks_in_ddp(model)
    return sparse


def find_targets(model: nn.Module, config: SparsityConfig) -> dict[str, nn.Module]:
    """The layers that `config` makes sparse, of `PLAIN_LAYERS`, by name, in the model's order.

    Raises:
        ValueError: see `sparsify`.
    """
    originals, added = named_originals(model), added_by_adapters(model)
    modules = {name: module for name, module in originals.items() if module not in added}
    linears: dict[str, nn.Module] = {
        name: module for name, module in modules.items() if name and isinstance(module, PLAIN_LAYERS)
    }
    targets = (
        _block_projections(model, modules, linears)
        if config.target_modules is None
        else _matching(linears, config.target_modules, [name for name in originals if name not in modules])
    )
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(original_name(name))
    copied = copied_by_adapters(model)
    for name, linear in targets.items():
        if linear in copied:
            raise ValueError(
                f"{name} has a copy that runs instead of it, of PEFT's modules_to_save: leave it out of that, or of "
                "target_modules"
            )
        check_plain(name, linear)
        if type(linear) not in PLAIN_LAYERS:
            raise ValueError(
                f"{name} is a {type(linear).__name__}, not a plain nn.Linear or Conv1D: leave it out of target_modules"
            )
        weight = linear.get_parameter("weight")
        shared = users.get(id(weight), [])
        if len(shared) > 1:
            raise ValueError(
                f"{name} shares its weight with {[s for s in shared if s != name + '.weight']}: a mask would "
                "reach those too. Untie them, or leave it out of target_modules"
            )
        if not weight.requires_grad:
            raise ValueError(f"{name} is frozen: unfreeze it, or leave it out of target_modules")
    return targets


def _matrix(layer: nn.Module) -> Tensor:
    """The whole weight of a plain layer, (out, in)."""
    return masked_class(layer).matrix(whole_weight(layer.get_parameter("weight")))


def _matrix_shape(layer: nn.Module) -> tuple[int, int]:
    rows, columns = weight_shape(layer.get_parameter("weight"))
    return (columns, rows) if masked_class(layer).transposed else (rows, columns)


def _block_projections(
    model: nn.Module, modules: dict[str, nn.Module], linears: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """Linear layers inside the repeated blocks of the model, which transformers keeps in `nn.ModuleList`s.

    Raises:
        ValueError: there are none, or they are not all: some projections are parameters that no linear layer holds.
    """
    blocks = tuple(
        f"{name}."
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and len(module) and not isinstance(module[0], PLAIN_LAYERS)
    )
    found = {name: linear for name, linear in linears.items() if name.startswith(blocks)} if blocks else {}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layers inside a list of blocks: name the layers in target_modules. "
            f"Its linear layers: {some(linears)}"
        )
    for name, module in modules.items():
        for parameter, value in module.named_parameters(recurse=False) if name.startswith(blocks) else ():
            if _holds_matrices(module, value):
                kinds = list(dict.fromkeys(linear.rpartition(".")[2] for linear in found))
                raise ValueError(
                    f"{name} is a {type(module).__name__}, whose parameter {parameter} {tuple(value.shape)} holds "
                    "several matrices (of experts or heads): those cannot be masked and would stay dense. Name the "
                    f"layers to make sparse in target_modules. Linear layers in the blocks: {some(kinds)}"
                )
    return found


def _holds_matrices(module: nn.Module, parameter: Tensor) -> bool:
    if isinstance(module, _ConvNd):
        return False
    stacked = parameter.dim() > 2 and min(parameter.shape[-2:]) > 1
    # DBRX has its experts one below the other
    return stacked or (parameter.dim() == 2 and "Expert" in type(module).__name__)


def _matching(linears: dict[str, nn.Module], patterns: list[str], added: list[str]) -> dict[str, nn.Module]:
    found: set[str] = set()
    for pattern in patterns:
        matches = matching(linears, pattern)
        if not matches and (own := matching(added, pattern)):
            raise ValueError(
                f"target_modules has {pattern!r}, which matches only what PEFT's adapters have put into the model: "
                f"{some(own)}. Those stay dense: name layers of the model itself"
            )
        if not matches:
            raise ValueError(
                f"target_modules has {pattern!r}, which matches no linear layer: give a suffix such as 'q_proj', or a "
                f"regular expression that matches a whole name. Linear layers: {some(linears)}"
            )
        found.update(matches)
    return {name: linear for name, linear in linears.items() if name in found}


def _check_masks(masks: dict[str, Tensor], shapes: dict[str, tuple[int, int]]) -> None:
    if set(masks) != set(shapes):
        missing, extra = sorted(set(shapes) - set(masks)), sorted(set(masks) - set(shapes))
        raise ValueError(
            f"the masks are not those of this model and config: missing {missing[:3]}, unknown {extra[:3]}"
        )
    for name, mask in masks.items():
        shape = shapes[name]
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(f"the mask of {name} is {mask.dtype} {tuple(mask.shape)}; the layer takes bool {shape}")

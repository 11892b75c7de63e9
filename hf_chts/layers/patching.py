"""sparsify(): which projections of a model become masked layers, with which topology; and dense again."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_chts.config import SparsityConfig
from hf_chts.layers.conversion import convert_layers
from hf_chts.layers.coupling import couplings
from hf_chts.layers.heads import head_blocks
from hf_chts.layers.initial_masks import check_links, initial_masks
from hf_chts.layers.masked_layer import MaskedLayer
from hf_chts.layers.masked_linear import masked_class
from hf_chts.layers.plain_weight import check_places, check_plain
from hf_chts.layers.shares import Lazy, overrides
from hf_chts.layers.targets import check_targets, earlier_targets, find_targets, matrix_shape
from hf_chts.layers.wrappers import named_originals, unwrap
from hf_chts.sharding.partitions import strays, whole_weight

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
            ValueError: something else has taken hold of a weight, or the place of a layer.
        """
        check_places(self.model, self.layers)
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
            target layers, or those that were the targets by default in earlier versions.
        calibration: for the initial topology "correlated", the inputs of every target layer over some samples,
            (samples, in_features) by layer name.

    Returns:
        The handle; also found again with `SparseModel.of(model)`.

    Raises:
        ValueError: nothing matches, a weight is shared, frozen, too small, without data or held by something else, the
            blocks have projections that are no layers, the model is sparse already, or `masks` do not fit. Everything
            is checked before the model is touched.
    """
    model = unwrap(model)
    if SparseModel.of(model) is not None:
        raise ValueError("the model is sparse already: call unsparsify() on its handle, SparseModel.of(model)")
    targets = {} if config.is_dense else _targets(model, config, masks)
    _refuse_meta(targets)
    if config.percolation and targets:
        couplings(cast(PreTrainedModel, model), list(targets))  # refuses architectures whose coupling is not known
    shapes = {name: matrix_shape(layer) for name, layer in targets.items()}
    weights = Lazy(lambda name: _matrix(targets[name]), targets)
    blocks = head_blocks(model, shapes) if config.per_head and targets else {}
    if targets:
        overrides(targets, config)
        check_links(shapes, weights, config, blocks)
    if masks is None:
        masks = initial_masks(shapes, weights, config, calibration, blocks)
    else:
        _check_masks(masks, shapes)
    layers = convert_layers(targets, masks)
    sparse = SparseModel(model, config, layers, blocks)
    # not a submodule: plain attribute, so it is in no state dict
    object.__setattr__(model, _HANDLE, sparse)
    sparse.ignore_masks_in_ddp(model)
    return sparse


def follow_masks(sparse: SparseModel, masks: Mapping[str, Tensor]) -> None:
    """Make the layers sparse that have masks in a checkpoint which an earlier version wrote with default targets.

    Nothing is done where the masks are of any other layers.
    """
    earlier = _earlier(sparse.model, sparse.config, masks)
    if earlier is None or set(earlier) == set(sparse.layers):
        return
    check_targets(sparse.model, {name: layer for name, layer in earlier.items() if name not in sparse.layers})
    shapes = {name: matrix_shape(layer) for name, layer in earlier.items()}
    _check_masks(dict(masks), shapes)
    blocks = head_blocks(sparse.model, shapes) if sparse.config.per_head else {}
    new = convert_layers({name: layer for name, layer in earlier.items() if name not in sparse.layers}, masks)
    sparse.layers = {name: new.get(name) or sparse.layers[name] for name in earlier}
    sparse.blocks = blocks
    sparse.ignore_masks_in_ddp(sparse.model)


def _targets(model: nn.Module, config: SparsityConfig, masks: Mapping[str, Tensor] | None) -> dict[str, nn.Module]:
    """The target layers; where masks are given that an earlier version made by its default, those that it took."""
    earlier = None if masks is None else _earlier(model, config, masks)
    if earlier is None:
        return find_targets(model, config)
    check_targets(model, earlier)
    return earlier


def _earlier(model: nn.Module, config: SparsityConfig, masks: Mapping[str, Tensor]) -> dict[str, nn.Module] | None:
    """The layers that were sparse by default in earlier versions, if these are their masks."""
    if config.target_modules is not None or config.exclude_modules:
        return None
    earlier = earlier_targets(model)
    return earlier if set(earlier) == set(masks) else None


def _refuse_meta(targets: Mapping[str, nn.Module]) -> None:
    """Raises ValueError for weights without data: what fills them later knows nothing of masks."""
    for name, layer in targets.items():
        if layer.get_parameter("weight").is_meta:
            raise ValueError(
                f"{name} is on the meta device, where weights have no values and masks would be lost: give the model "
                "its weights first (from_pretrained, or to_empty and init_weights on a real device; where FSDP leaves "
                "ranks without them, fsdp_cpu_ram_efficient_loading: false)"
            )


def _matrix(layer: nn.Module) -> Tensor:
    """The whole weight of a plain layer, (out, in)."""
    return masked_class(layer).matrix(whole_weight(layer.get_parameter("weight")))


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

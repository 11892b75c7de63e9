"""sparsify(): makes the linear projections of a model sparse, and gives a handle on it."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_chts.config import SparsityConfig
from hf_chts.evolution.evolver import Evolver
from hf_chts.files.reading import LazyMapping
from hf_chts.layers.activations import keep_largest_activations
from hf_chts.layers.conversion import convert_layers, link_layers
from hf_chts.layers.coupling import couplings
from hf_chts.layers.heads import head_blocks
from hf_chts.layers.initial_masks import check_links, initial_masks
from hf_chts.layers.initial_weights import initialize_links
from hf_chts.layers.masked_linear import masked_class
from hf_chts.layers.materialize import materialize
from hf_chts.layers.packed_model import check_not_packed
from hf_chts.layers.shares import most_links, overrides
from hf_chts.layers.sparse_layer import SparseLayer
from hf_chts.layers.sparse_layers import HANDLE, SparseLayers
from hf_chts.layers.targets import check_targets, earlier_targets, find_targets, matrix_shape
from hf_chts.layers.wrappers import unwrap
from hf_chts.sharding.partitions import whole_weight


class SparsityHandle(SparseLayers):
    """A handle on a model that `sparsify` has made sparse; see `SparseLayers`."""

    @staticmethod
    def of(model: nn.Module) -> "SparsityHandle | None":
        """The handle of a sparse model, wrapped or not, or None."""
        return getattr(unwrap(model), HANDLE, None)

    def materialize(self, device: torch.device | str = "cpu") -> None:
        """Give a model that was made sparse on the meta device its weights: new random ones, as a dense model's.

        It never is dense: at most one of its blocks is at a time. The random numbers are not those that the dense
        model would have got.

        Raises:
            ValueError: the model is not on the meta device, or of another library than transformers.
        """
        if not isinstance(self.model, PreTrainedModel):
            raise ValueError(
                f"only models of transformers say how they are initialized, not {type(self.model).__name__}"
            )
        materialize(self.model, device)

    def evolver(
        self,
        optimizer: Any,
        max_steps: int,
        *,
        step: int = 0,
        tokens: int = 1024,
        dtype: torch.dtype | None = None,
    ) -> Evolver:
        """Evolve the topology in a training loop of your own; see `Evolver`. Collective.

        Args:
            optimizer: torch's, Accelerate's or DeepSpeed's, as prepared for the run.
            max_steps: optimizer steps of the run, for the schedules.
            step: how many of them are finished.
            tokens: in each forward pass, for the measurement of compute: auto.
            dtype: of autocast, if the loop uses it; likewise.

        Raises:
            ValueError: the optimizer has none of the sparse layers' weights, or see `Evolver.begin`.
        """
        evolver = Evolver(self)
        evolver.begin(max_steps, optimizer, step, tokens=tokens, dtype=dtype)
        assert evolver.engine is not None
        trains = [layer for layer in self.layers.values() if layer.parameter.requires_grad]
        if trains and not evolver.engine.trained(self.layers):
            evolver.close()
            raise ValueError(
                "the optimizer has none of the sparse layers' weights: make it from model.parameters() of this model, "
                "and pass the one that steps"
            )
        return evolver


def sparsify(
    model: nn.Module,
    config: SparsityConfig,
    *,
    masks: Mapping[str, Tensor] | None = None,
    calibration: Mapping[str, Tensor] | Tensor | None = None,
) -> SparsityHandle:
    """Make the target layers of `model` sparse, in place.

    Args:
        model: any model, wrapped or not; by default the linear projections of its decoder blocks are the target.
        config: which layers become sparse and with which initial topology; none does with method "dense".
        masks: topologies to use instead of new ones, bool (out, in) by layer name, for exactly the target layers, or
            for those that an earlier version would have chosen by default.
        calibration: for the initial topologies "correlated" and "wanda", the inputs of every target layer over some
            samples, (samples, in_features) by layer name; for "wanda" their norms over the samples, (in_features,),
            will do (`layers.calibration.input_norms`). Or one tensor: the inputs of the model, (samples, features),
            whose correlations are tiled over all layers, and whose norms fit layers with as many inputs.

    Returns:
        The handle; also found again with `SparsityHandle.of(model)`.

    Raises:
        ValueError: no layer matches, a layer cannot be made sparse (its weight is shared, frozen, too small, without
            data or held by another module), the blocks keep projections outside of layers, the model is sparse already,
            or `masks` do not fit. Everything is checked before the model is changed.
    """
    model = unwrap(model)
    if SparsityHandle.of(model) is not None:
        raise ValueError("the model is sparse already: call unsparsify() on its handle, SparsityHandle.of(model)")
    check_not_packed(model, "made sparse")
    targets = {} if config.is_dense else _targets(model, config, masks)
    _refuse_meta(targets, config, new=masks is None)
    if config.percolation and targets:
        couplings(cast(PreTrainedModel, model), list(targets))  # refuses architectures whose coupling is not known
    shapes = {name: matrix_shape(layer) for name, layer in targets.items()}
    weights = LazyMapping(lambda name: _matrix(targets[name]), targets)
    blocks = head_blocks(model, shapes) if config.per_head and targets else {}
    if targets:
        overrides(targets, config)
        check_links(shapes, weights, config, blocks)
    if config.activation_topk < 1:
        keep_largest_activations(model, config.activation_topk)
    new = masks is None
    if masks is None:
        masks = initial_masks(shapes, weights, config, calibration, blocks)
    else:
        _check_masks(masks, shapes, config)
    sparse = SparsityHandle(model, config, _converted(targets, masks, config), blocks)
    if new:
        initialize_links(sparse.layers, config)
    # not a submodule: plain attribute, so it is in no state dict
    object.__setattr__(model, HANDLE, sparse)
    sparse.ignore_masks_in_ddp(model)
    return sparse


def follow_masks(sparse: SparsityHandle, masks: Mapping[str, Tensor]) -> None:
    """Make the same layers sparse as an earlier version did by default, if these are the masks of its checkpoint.

    Masks of any other layers change nothing.
    """
    earlier = _earlier(sparse.model, sparse.config, masks)
    if earlier is None or set(earlier) == set(sparse.layers):
        return
    check_targets(sparse.model, {name: layer for name, layer in earlier.items() if name not in sparse.layers})
    shapes = {name: matrix_shape(layer) for name, layer in earlier.items()}
    _check_masks(masks, shapes, sparse.config)
    blocks = head_blocks(sparse.model, shapes) if sparse.config.per_head else {}
    new = _converted(
        {name: layer for name, layer in earlier.items() if name not in sparse.layers}, masks, sparse.config
    )
    sparse.layers = {name: new.get(name) or sparse.layers[name] for name in earlier}
    sparse.blocks = blocks
    sparse.ignore_masks_in_ddp(sparse.model)


def _converted(
    targets: Mapping[str, nn.Module], masks: Mapping[str, Tensor], config: SparsityConfig
) -> dict[str, SparseLayer]:
    """Plain layers turned into sparse ones with these masks, in the storage of the config."""
    if config.storage == "masked":
        return dict(convert_layers(targets, masks))
    links = {name: int(torch.count_nonzero(masks[name])) for name in targets}
    shapes = {name: matrix_shape(layer) for name, layer in targets.items()}
    slots = most_links(shapes, config, links) if targets else {}
    linked = link_layers(targets, masks, slots, config.dense_mib * 2**20)
    if config.compute == "sparse":  # with auto, an evolver measures first
        for layer in linked.values():
            layer.storage.multiply_links(up_to=layer.storage.room)
    return dict(linked)


def _targets(model: nn.Module, config: SparsityConfig, masks: Mapping[str, Tensor] | None) -> dict[str, nn.Module]:
    """The target layers; if `masks` are those of an earlier version's default, the layers that it chose."""
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


def _refuse_meta(targets: Mapping[str, nn.Module], config: SparsityConfig, new: bool) -> None:
    """Raises ValueError for weights without data: what fills them later knows nothing of masks."""
    remedy = (
        "give the model its weights first (from_pretrained, or to_empty and init_weights on a real device; where FSDP "
        "leaves ranks without them, fsdp_cpu_ram_efficient_loading: false)"
    )
    for name, layer in targets.items():
        if not layer.get_parameter("weight").is_meta:
            continue
        if config.storage != "links":
            raise ValueError(
                f"{name} is on the meta device, where weights have no values and masks would be lost: {remedy}, or use "
                "storage: links and call materialize() on the handle"
            )
        if new and config.initial_weights != "model":
            raise ValueError(
                f"{name} is on the meta device, and initial_weights {config.initial_weights!r} gives links values: "
                "give the model its weights first, or leave initial_weights out"
            )
        if config.allocation == "global":
            raise ValueError(
                f"{name} is on the meta device, and allocation 'global' compares weights: {remedy}, or choose another "
                "allocation"
            )
        if new and config.starts_from_weights:
            raise ValueError(
                f"{name} is on the meta device, and initial_topology {config.initial_topology!r} chooses links by "
                f"their weights: {remedy}, or choose another initial_topology"
            )


def _matrix(layer: nn.Module) -> Tensor:
    """The whole weight of a plain layer, (out, in)."""
    return masked_class(layer).matrix(whole_weight(layer.get_parameter("weight")))


def _check_masks(masks: Mapping[str, Tensor], shapes: dict[str, tuple[int, int]], config: SparsityConfig) -> None:
    if set(masks) != set(shapes):
        missing, extra = sorted(set(shapes) - set(masks)), sorted(set(masks) - set(shapes))
        raise ValueError(
            f"the masks are not those of this model and config: missing {missing[:3]}, unknown {extra[:3]}"
        )
    for name, mask in masks.items():
        shape = shapes[name]
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(f"the mask of {name} is {mask.dtype} {tuple(mask.shape)}; the layer takes bool {shape}")
        pattern = config.links_pattern
        if pattern is not None and not pattern.kept_by(mask):
            raise ValueError(
                f"the mask of {name} does not have the pattern {pattern.name!r} of the config: set pattern: none, or "
                "leave masks out for new ones under the pattern"
            )

"""The sparse layers of one model."""

from collections.abc import Mapping
from math import prod

from torch import Tensor, nn

from hf_chts.config import SparsityConfig
from hf_chts.files.reading import LazyMapping
from hf_chts.layers.activations import keep_largest_activations
from hf_chts.layers.links import check_zeros
from hf_chts.layers.plain_weight import check_places, check_plain
from hf_chts.layers.sparse_layer import SparseLayer
from hf_chts.layers.wrappers import named_originals
from hf_chts.sharding.partitions import weight_shape

# the attribute of a sparse model that holds its handle
HANDLE = "_hf_chts_sparse_model"


class SparseLayers:
    """The sparse layers of a model, and what they have in common.

    Attributes:
        model: the model itself, without wrappers.
        config: the SparsityConfig that made it sparse.
        layers: its sparse layers by their name in the model, in the model's order.
        blocks: the number of blocks of rows with a topology of their own, by layer name; 1 where absent.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SparsityConfig,
        layers: dict[str, SparseLayer],
        blocks: Mapping[str, int] | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.layers = layers
        self.blocks = dict(blocks or {})

    def sparsity(self) -> float:
        """The share of missing links over all sparse layers; 0 for a dense model."""
        total = sum(prod(layer.storage.shape) for layer in self.layers.values())
        return 1 - self.links() / total if total else 0.0

    def links(self) -> int:
        """The number of links of all sparse layers."""
        return sum(layer.links for layer in self.layers.values())

    def dense_parameters(self) -> int:
        """The parameters of the model outside of its sparse layers' weights, whole ones where an engine splits them."""
        mine = {id(layer.parameter) for layer in self.layers.values()}
        return sum(weight_shape(p).numel() for p in self.model.parameters() if id(p) not in mine)

    def masks(self) -> dict[str, Tensor]:
        """The masks by layer name: bool (out_features, in_features), read only."""
        return dict(self.topologies())

    def topologies(self) -> Mapping[str, Tensor]:
        """As `masks`, but each is made, or looked up, when it is read, so that one is in memory at a time."""
        return LazyMapping(lambda name: self.layers[name].topology, self.layers)

    def copies(self) -> dict[str, SparseLayer]:
        """Copies of sparse layers in the model, such as PEFT's modules_to_save, by name.

        They keep their links, and are not evolved.
        """
        mine = {id(layer) for layer in self.layers.values()}
        return {
            name: module
            for name, module in named_originals(self.model).items()
            if isinstance(module, SparseLayer) and id(module) not in mine
        }

    def check(self) -> None:
        """Raises RuntimeError, naming the layer, if a weight is not 0 where there is no link.

        Raises:
            ValueError: a layer was replaced, or its weight is held in another form.
        """
        check_places(self.model, self.layers)
        for name, layer in (self.layers | self.copies()).items():
            check_plain(name, layer)
            check_zeros({name: layer})

    def unsparsify(self) -> nn.Module:
        """Make every layer a plain dense one again, with the weights as they are, and return the model.

        Where only the largest activations stayed (activation_topk), all of them do again.

        Raises:
            ValueError: a weight is held in another form. Nothing is changed then.
        """
        layers = self.layers | self.copies()
        for name, layer in layers.items():
            check_plain(name, layer)
        for layer in layers.values():
            layer.revert()
        if self.config.activation_topk < 1:
            keep_largest_activations(self.model, 1.0)
        self.layers = {}
        if hasattr(self.model, HANDLE):
            delattr(self.model, HANDLE)
        self.ignore_masks_in_ddp(self.model)
        return self.model

    def ignore_masks_in_ddp(self, model: nn.Module) -> None:
        """Make DDP, when it wraps `model`, leave the masks alone; `model` is the model or a wrapper of it.

        Otherwise it would broadcast every mask at each forward. The ranks' masks are the same by construction.
        """
        mine = {
            f"{name}.{buffer}"
            for name, module in model.named_modules()
            if isinstance(module, SparseLayer)
            for buffer in module.storage.buffers()
        }
        ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
        others = [name for name in ignored if name.rpartition(".")[2] not in ("mask", "link_positions")]
        model._ddp_params_and_buffers_to_ignore = [*others, *sorted(mine)]  # type: ignore[assignment]

"""The sparse layers of one model."""

from collections.abc import Mapping

from torch import Tensor, nn

from hf_chts.config import SparsityConfig
from hf_chts.layers.links import check_zeros
from hf_chts.layers.masked_layer import MaskedLayer
from hf_chts.layers.plain_weight import check_places, check_plain
from hf_chts.layers.wrappers import named_originals

# the attribute of a sparse model that holds its handle
HANDLE = "_hf_chts_sparse_model"


class SparseLayers:
    """The sparse layers of a model, and what they have in common.

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
            check_zeros({name: layer})

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
        if hasattr(self.model, HANDLE):
            delattr(self.model, HANDLE)
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

"""Loading an export into layers that keep their links in slots, without making the model dense.

transformers lets a quantizer change the model before its weights are read, and convert each weight as it is: so the
model is made sparse on the meta device, and each weight is reduced to the values of its links when it is its turn.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightTransform
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from hf_chts.config import SparsityConfig
from hf_chts.export.exported_values import check_zeros
from hf_chts.export.packed_files import PackedFiles
from hf_chts.export.packed_format import KINDS
from hf_chts.export.packed_loading import PackedLoader, PackedWeightsConfig, Unpacking
from hf_chts.export.weight_files import DamagedFile
from hf_chts.files.reading import LazyMapping
from hf_chts.layers.masked_linear import PLAIN_LAYERS, masked_class
from hf_chts.sparse_model import SparsityHandle, sparsify

_METHOD = "hf_chts_links"
# options of from_pretrained that a config which is given has no part in
KNOWN_OPTIONS = {
    "dtype",
    "torch_dtype",
    "device_map",
    "attn_implementation",
    "trust_remote_code",
    "output_loading_info",
}


class LoadingConfig(PackedWeightsConfig):
    """What one call of load_sparse tells a loader. It is in no file.

    Args:
        method: by which transformers finds the loader.
        directory: of the export.
        packed: its weights, if it is packed.
        masks: bool (out, in) by layer name, if it is plain.
    """

    def __init__(self, method: str, directory: Path, packed: PackedFiles | None, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.quant_method = method  # type: ignore[assignment]
        self.directory, self.packed, self.masks = directory, packed, masks

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}

    def get(self, name: str, default: Any = None) -> Any:
        """transformers asks a config that it has not read from a file as it asks a dict."""
        return getattr(self, name, default)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoadingConfig":
        return self


class LinkedWeightsConfig(LoadingConfig):
    """What load_sparse tells the loader of layers that keep their links in slots.

    Args:
        sparsity: the export's config.
        slots: the position of the link in each slot, by layer name, if it is a checkpoint.
    """

    def __init__(
        self,
        directory: Path,
        sparsity: SparsityConfig,
        packed: PackedFiles | None,
        masks: Mapping[str, Tensor],
        slots: Mapping[str, Tensor],
    ) -> None:
        super().__init__(_METHOD, directory, packed, masks)
        self.sparsity, self.slots = sparsity, slots


class LinkedLoader(PackedLoader):
    """Makes the model sparse before its weights are loaded, and loads the values of links."""

    quantization_config: LinkedWeightsConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.values = _Values(self.quantization_config)

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        return super().update_attn_implementation(config) if self.quantization_config.packed else config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Make the model, which is on the meta device, sparse.

        Raises:
            FileNotFoundError, ValueError: see `PackedFiles` and `sparsify`.
        """
        export = self.quantization_config
        masks = export.masks
        if export.packed:
            super()._process_model_before_weight_loading(model, checkpoint_files, **kwargs)
            layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PLAIN_LAYERS)}
            masks = packed_masks(export.packed, layers)
        with torch.device("cpu"):  # and not on the meta device, as all that is made here
            sparse = sparsify(model, export.sparsity, masks=masks)  # raises for masks that fit no layer
            for name, positions in export.slots.items():
                sparse.layers[name].storage.restore(masks[name], positions)
        for layer in sparse.layers.values():
            layer._is_hf_initialized = True  # type: ignore[assignment] # nothing that is loaded needs new weights
            # transformers takes buffers that are in no file for ones without contents
            layer.__dict__["link_positions"] = layer._buffers.pop("link_positions")

    def update_weight_conversions(self, weight_conversions: list[WeightTransform], model: Any) -> list[WeightTransform]:
        if self.quantization_config.packed:
            return [*weight_conversions, Unpacking([f"weight_{kind}" for kind in KINDS], "link_values", [self.values])]
        found = SparsityHandle.of(model)
        assert found is not None
        if self.quantization_config.slots:
            return weight_conversions
        reducing = KnownLayers(["weight"], "link_values", [self.values])
        reducing.know(model, found.layers)
        return [*weight_conversions, reducing]

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Check what was loaded, and leave a model as `sparsify` makes it.

        Raises:
            ValueError: a weight is not 0 off its mask.
        """
        super().postprocess_model(model, **kwargs)
        if self.values.problems:
            raise self.values.problems[0]
        sparse = SparsityHandle.of(model)
        assert sparse is not None
        for layer in sparse.layers.values():
            positions = layer.__dict__.pop("link_positions")
            layer.register_buffer("link_positions", positions.to(layer.parameter.device), persistent=False)


class KnownLayers(Unpacking):
    """Converts the weights of layers that it knows; other weights are loaded as they are.

    Attributes:
        names: of the layers, with and without the prefix of a base model.
    """

    names: set[str]

    def know(self, model: PreTrainedModel, layers: Iterable[str]) -> None:
        prefix = f"{model.base_model_prefix}."
        self.names = {form for name in layers for form in (name, prefix + name, name.removeprefix(prefix))}

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        name, _, kind = source_key.rpartition(".")
        if kind != "weight" or name not in self.names:
            return source_key, None
        return f"{name}.{self.target_patterns[0]}", "weight"


class _Values(ConversionOps):
    """What is stored of a weight → the values of its slots.

    Attributes:
        problems: errors; transformers would catch them, and say that a conversion failed.
    """

    def __init__(self, export: LinkedWeightsConfig) -> None:
        self.export = export
        self.problems: list[ValueError] = []

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        name = full_layer_name.rpartition(".")[0]
        layer = model.get_submodule(name)
        if self.export.packed:
            stored = input_dict["weight_values"][0]  # by ascending position
            values = stored.new_zeros(layer.storage.room)
            values[layer.storage.order().to(stored.device)] = stored
        else:
            weight = input_dict["weight"][0]
            try:
                check_zeros(self.export.directory, name, layer.matrix(weight), layer.topology)
            except ValueError as error:
                self.problems.append(error)
            padded = torch.cat([weight.reshape(-1), weight.new_zeros(1)])
            values = padded[layer.link_positions.to(weight.device).long()]
        return {full_layer_name: values}


def packed_masks(packed: PackedFiles, layers: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The masks of a packed directory, bool (out, in) by layer name, each read when it is looked up.

    Raises:
        DamagedFile: a weight is stored transposed, and the layer of the model is not, or the other way round.
    """
    keys = {key.removesuffix(".weight"): key for key in packed.weights}
    for name, key in keys.items():
        if name in layers and masked_class(layers[name]).transposed != packed.weights[key].transposed:
            raise DamagedFile(
                packed.files.entries[f"{key}_bits"].path, f"{key} is transposed here or in the model, not both"
            )
    return LazyMapping(lambda name: packed.mask(keys[name]), keys)


if _METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(_METHOD)(LinkedWeightsConfig)
    register_quantizer(_METHOD)(LinkedLoader)

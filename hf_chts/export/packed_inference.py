"""Loading an export for inference, with all that its layers keep packed (layers/packed_layer.py).

As in linked_loading.py the layers are changed before their weights are loaded, and no weight of the model is ever
dense: the values of the links come from the file, and each layer is packed when they are there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightTransform
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from hf_chts.export.exported_values import check_zeros
from hf_chts.export.linked_loading import KnownLayers, LoadingConfig, packed_masks
from hf_chts.export.packed_files import PackedFiles
from hf_chts.export.packed_format import KINDS
from hf_chts.export.packed_loading import PackedLoader, Unpacking
from hf_chts.layers import pages
from hf_chts.layers.masked_linear import PLAIN_LAYERS
from hf_chts.layers.packed_layer import PackedLayer, packed_class
from hf_chts.layers.packed_model import for_inference, packed_layers
from hf_chts.layers.plain_weight import check_plain
from hf_chts.sparse_model import SparsityHandle

_METHOD = "hf_chts_inference"


class InferenceConfig(LoadingConfig):
    """What load_sparse tells the loader of layers that stay packed."""

    def __init__(self, directory: Path, packed: PackedFiles | None, masks: Mapping[str, Tensor]) -> None:
        super().__init__(_METHOD, directory, packed, masks)


class InferenceLoader(PackedLoader):
    """Packs the layers of a model before its weights are loaded, and loads the values of their links."""

    quantization_config: InferenceConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.masks: Mapping[str, Tensor] = self.quantization_config.masks
        self.problems: list[ValueError] = []  # transformers would catch them, and say that a conversion failed

    def update_attn_implementation(self, config: Any) -> Any:
        return super().update_attn_implementation(config) if self.quantization_config.packed else config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Change the layers of the model, which is on the meta device.

        Raises:
            FileNotFoundError, ValueError: see `PackedFiles`; or a mask fits no layer.
        """
        export = self.quantization_config
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PLAIN_LAYERS)}
        if export.packed:
            super()._process_model_before_weight_loading(model, checkpoint_files, **kwargs)
            self.masks = packed_masks(export.packed, layers)
        for name in self.masks:
            links = export.packed.weights[f"{name}.weight"].links if export.packed else _links(self.masks[name])
            if name not in layers:
                raise ValueError(f"{export.directory}: there is a mask of {name}, and no such layer in the model")
            check_plain(name, layers[name])
            layer = packed_class(type(layers[name])).attach(layers[name], links)
            if not export.packed and self.masks[name].shape != layer.shape:
                raise ValueError(
                    f"{export.directory}: the mask of {name} is {tuple(self.masks[name].shape)}, and the layer "
                    f"{layer.shape}: restore both from one export"
                )
            layer._is_hf_initialized = True  # type: ignore[assignment] # nothing that is loaded needs new weights

    def update_weight_conversions(self, weight_conversions: list[WeightTransform], model: Any) -> list[WeightTransform]:
        values = _Values(self)
        if self.quantization_config.packed:
            return [*weight_conversions, Unpacking([f"weight_{kind}" for kind in KINDS], "packed_values", [values])]
        reducing = KnownLayers(["weight"], "packed_values", [values])
        reducing.know(model, self.masks)
        return [*weight_conversions, reducing]

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Pack the layers.

        Raises:
            ValueError: a weight is not 0 off its mask.
        """
        super().postprocess_model(model, **kwargs)
        if self.problems:
            raise self.problems[0]
        for name, layer in packed_layers(model).items():
            pack(layer, self.masks[name], layer.packed_values)
        _let_go_of_files(model)
        pages.release()
        for_inference(model)


class _Values(ConversionOps):
    """What is stored of a weight → the values of its links, by ascending position."""

    def __init__(self, loader: InferenceLoader) -> None:
        self.loader = loader

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
        if "weight_values" in input_dict:
            return {full_layer_name: input_dict["weight_values"][0]}
        weight = input_dict["weight"][0]
        name = full_layer_name.rpartition(".")[0]
        mask = _as_stored(model.get_submodule(name), self.loader.masks[name]).to(weight.device)
        try:
            check_zeros(self.loader.quantization_config.directory, name, weight, mask)
        except ValueError as error:
            self.loader.problems.append(error)
        return {full_layer_name: weight[mask]}


def pack(layer: PackedLayer, mask: Tensor, values: Tensor) -> None:
    """`PackedLayer.pack` with a mask as (out, in)."""
    layer.pack(_as_stored(layer, mask), values)


def pack_model(model: PreTrainedModel) -> PreTrainedModel:
    """Pack the layers of a model that `sparsify` has made sparse, one after the other; it is no longer sparse then."""
    sparse = SparsityHandle.of(model)
    assert sparse is not None
    layers = dict(sparse.layers)
    masks: Any = sparse.topologies()
    for name, layer in layers.items():
        mask = masks[name].clone()
        stored = layer.matrix(mask)
        plain: nn.Module = layer.revert()
        weight = plain.get_parameter("weight").detach()
        values = weight[stored.to(weight.device)]
        packed = packed_class(type(plain)).attach(plain, len(values))
        pack(packed, mask, values)
        del sparse.layers[name]
    sparse.unsparsify()
    pages.release()
    for_inference(model)
    return model


def _as_stored(layer: PackedLayer, mask: Tensor) -> Tensor:
    return mask.t() if layer.transposed else mask


def _links(mask: Tensor) -> int:
    return int(torch.count_nonzero(mask))


def _let_go_of_files(model: nn.Module) -> None:
    """Copy what is dense into memory of its own: as part of a mapped file it would keep all the file's pages."""
    mine = {id(buffer) for layer in packed_layers(model).values() for buffer in layer.buffers(recurse=False)}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and id(tensor) not in mine:
            tensor.data = pages.empty(tensor.shape, tensor.dtype).copy_(tensor.detach())


if _METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(_METHOD)(InferenceConfig)
    register_quantizer(_METHOD)(InferenceLoader)

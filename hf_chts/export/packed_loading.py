"""`from_pretrained` for packed directories, through transformers' registry of quantizers.

Importing this module registers the method (registration.py does so). The loaded model is an ordinary dense one, without
quantizer and quantization config, so that it trains, and `save_pretrained` writes a plain directory.
"""

import copy
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_chts.export.activation_code import activations_of
from hf_chts.export.packed_files import PackedFiles
from hf_chts.export.packed_format import KINDS, METHOD, VERSION, known_version, unpack_weight
from hf_chts.export.packed_index import index_bits
from hf_chts.export.weight_files import PACKED_STEM, find_shards, index_path
from hf_chts.layers.activations import keep_largest_activations

_UNPACK_FIRST = "Make a plain directory with `hf-chts unpack DIR OUT` and load that"


class PackedWeightsConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed directory's config.json.

    Raises:
        ValueError: its version or one of its fields is unknown to this version of hf_chts.
    """

    # transformers' name for weights that are ordinary once loaded
    dequantize = True

    def __init__(self, quant_method: str = METHOD, version: Any = VERSION, **unknown: Any) -> None:
        if not known_version(version) or unknown:
            raise ValueError(
                f"the quantization_config in config.json is version {version!r} of hf_chts's format, with "
                f"{sorted(unknown)}; this hf_chts reads versions 1 to {VERSION}, without: upgrade it, or export again"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version = version


class PackedLoader(HfQuantizer):
    """Checks all files, and unpacks each sparse weight as it is loaded."""

    quantization_config: PackedWeightsConfig
    _activations = 1.0  # the share that stays, which a plain model of the class knows nothing of

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError(
                "packing is for storage, not for loading: leave quantization_config out, and write a packed directory "
                "with export_sparse(model, directory, packed=True)"
            )
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(f"packed weights cannot be offloaded to disk. {_UNPACK_FIRST}")

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Set the name of the weights' index. No other call has the config before transformers looks for the files."""
        if getattr(config, "distributed_config", None) is not None:
            raise ValueError(f"packed weights cannot be sharded on loading. {_UNPACK_FIRST}")
        if config.dtype is None:
            # else transformers would open a file whose name has not been checked yet
            raise ValueError(
                f"config.json of {config.name_or_path or 'the model'} has no dtype: add it, or export again"
            )
        directory = Path(config.name_or_path or "")
        if config.name_or_path and index_path(directory, PACKED_STEM).is_file():
            find_shards(directory, PACKED_STEM)  # a clearer error for a damaged index than transformers gives
        config.transformers_weights = index_path(directory, PACKED_STEM).name
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Check everything before it is loaded. The model is on the meta device.

        Raises:
            FileNotFoundError, ValueError: see `PackedFiles`; or the files are of another model.
        """
        directory = _common_directory(checkpoint_files or [], model.config.name_or_path or "")
        packed = PackedFiles(directory)
        packed.check_contents()
        self._activations = activations_of(directory)
        parameters, prefix = dict(model.named_parameters(remove_duplicate=False)), f"{model.base_model_prefix}."
        for key, weight in packed.weights.items():
            # transformers also loads a model with a head from one without, and vice versa
            names = {key, prefix + key, key.removeprefix(prefix)} & set(parameters)
            shapes = [tuple(parameters[name].shape) for name in names]
            if weight.shape not in shapes:
                raise ValueError(
                    f"{directory}: {key} is {weight.shape} among the weights, but "
                    f"{shapes[0] if shapes else 'absent'} in the {type(model).__name__} of its config.json: "
                    "restore both from one export"
                )

    def update_weight_conversions(self, weight_conversions: list[WeightTransform], model: Any) -> list[WeightTransform]:
        parts = [f"weight_{kind}" for kind in KINDS]
        return [*weight_conversions, Unpacking(parts, "weight", [_Unpack()])]

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Remove all traces of the loading, so that the model trains and is saved as a plain one."""
        keep_largest_activations(model, self._activations)
        self.remove_quantization_config(model)
        forget_packing(model.config)
        # save_pretrained reverts the conversions that are listed here
        used = getattr(model, "_weight_conversions", None) or []
        object.__setattr__(model, "_weight_conversions", [step for step in used if not isinstance(step, Unpacking)])

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def forget_packing(config: PreTrainedConfig) -> None:
    """Remove what only a packed directory has from a config, so that it is a plain model's."""
    settings = getattr(config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", METHOD)
    for name in ("quantization_config", "transformers_weights"):
        if method == METHOD and hasattr(config, name):
            delattr(config, name)


class _Unpack(ConversionOps):
    """The three stored tensors of a weight → the weight."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, list[Tensor]], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        bits, values, shape = (input_dict[f"weight_{kind}"][0] for kind in KINDS)
        claimed = shape.tolist()
        bits = index_bits(bits, claimed, len(values)).to(values.device)
        return {kwargs["full_layer_name"]: unpack_weight(bits, values, (claimed[0], claimed[1]))}


class Unpacking(WeightConverter):
    """With a cheap copy: transformers copies it for each tensor, and a deep copy costs as much as a small weight."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Unpacking":
        new = copy.copy(self)
        # the only parts that change
        new.collected_tensors, new.layer_targets = defaultdict(list), defaultdict(set)
        return new


def _common_directory(files: list[str], source: str) -> Path:
    """The directory of `files`: `source`, a subfolder of it, or the local copy of a Hub id.

    Raises:
        ValueError: the index led transformers elsewhere; nothing has been opened there.
    """
    # not resolved: in the Hub's cache files are links
    parents = {os.path.dirname(os.path.abspath(file)) for file in files}
    if len(parents) == 1 and os.path.isdir(source):
        root = os.path.abspath(source)
        inside = parents == {root} or not index_path(Path(root), PACKED_STEM).exists()
        parents = {parent for parent in parents if inside and os.path.commonpath([root, parent]) == root}
    if len(parents) != 1:
        raise ValueError(f"the index of {source} names files elsewhere: do not use it, and export the model again")
    return Path(parents.pop())


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(PackedWeightsConfig)
    register_quantizer(METHOD)(PackedLoader)

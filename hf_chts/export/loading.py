"""load_sparse: load an export with its masks, to train on, or packed for inference."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from hf_chts.checkpoint import load_masks
from hf_chts.config import SparsityConfig
from hf_chts.export.auto_class import model_class
from hf_chts.export.checksums import verify_checksums
from hf_chts.export.exported_values import check_zeros
from hf_chts.export.linked_loading import KNOWN_OPTIONS, LinkedWeightsConfig, packed_masks
from hf_chts.export.packed_files import PackedFiles
from hf_chts.export.packed_format import is_packed
from hf_chts.export.packed_inference import InferenceConfig, pack_model
from hf_chts.export.sources import architecture, checked_config, local_directory
from hf_chts.export.weight_files import PLAIN_STEM, WeightFiles
from hf_chts.layers.activations import keep_largest_activations
from hf_chts.layers.linked_layer import LinkedLayer
from hf_chts.layers.masked_linear import PLAIN_LAYERS, masked_class
from hf_chts.layers.shares import refuse_other_sparsity
from hf_chts.names import listed
from hf_chts.sparse_model import SparsityHandle, sparsify

Compute = Literal["dense", "sparse"]
_QUANTIZING = ("quantization_config", "load_in_8bit", "load_in_4bit")


def load_sparse(
    source: str | Path, *, compute: Compute | None = None, sparsity: SparsityConfig | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load an export, plain or packed, or a checkpoint, with its masks, to train on or, packed, for inference.

    For inference with dense weights `from_pretrained` of an export is enough.

    The model has the class that `architectures` in its config names, head included: one of transformers, or one that
    has been imported. It is already sparse: `SparsityHandle.of(model)` is its handle. No file of the export can make
    this run code or open other files.

    Args:
        source: a directory or a Hub id.
        compute: "sparse": for inference with packed weights, which take about the memory of a packed export, and
            decode at the speed of their bytes. Such a model cannot be trained or saved. None or "dense": to train on.
        sparsity: the config to train on with, in place of the export's; of the same layers.
        kwargs: for `from_pretrained`; for a Hub id also revision, token and the like. Code in the directory only runs
            with trust_remote_code=True.

    Raises:
        FileNotFoundError, ValueError: weights, masks or config are missing, damaged or contradict each other, the
            class is unknown, `compute` is, or `kwargs` ask for quantization.
    """
    if compute not in (None, *get_args(Compute)):
        raise ValueError(f"compute is {compute!r}: choose 'sparse', for inference with packed weights, or 'dense'")
    for name in _QUANTIZING:
        if kwargs.pop(name, None):
            raise ValueError(
                f"load_sparse got {name}, but quantized weights cannot be masked or trained: leave it out. To use the "
                "model quantized, pass it to from_pretrained with a plain export"
            )
    directory = local_directory(source, kwargs)
    contents = checked_config(directory)
    config = sparsity or SparsityConfig.load(directory)
    packed = PackedFiles(directory) if is_packed(contents) else None
    masks: Mapping[str, Tensor] = {}
    slots: Mapping[str, Tensor] = {}
    if not packed:
        topology = load_masks(directory)
        masks, slots = topology.masks, topology.slots
    options = {"trust_remote_code": False} | kwargs | {"output_loading_info": True}
    if architecture(contents) is None:
        raise ValueError(
            f"{directory}: config.json does not say in `architectures` which class the model is of: write its name "
            'there, as in "architectures": ["LlamaForCausalLM"]'
        )
    try:
        loader = model_class(contents, trust_remote_code=options["trust_remote_code"])
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    by_layers, in_slots = True, False  # weights are stored as layers have them; they are the values of slots
    if not packed:  # the loader checks packed ones itself
        verify_checksums(directory, PLAIN_STEM)
        files = WeightFiles(directory, PLAIN_STEM)  # raises for truncated or mixed files, and names them
        stored = files.entries.keys()
        in_slots = any(key.endswith(f".{LinkedLayer.parameter_name}") for key in stored)
        by_layers = in_slots or {f"{name}.weight" for name in masks} <= stored
    if compute == "sparse" and by_layers and not in_slots and kwargs.keys() <= KNOWN_OPTIONS:
        options["config"] = AutoConfig.from_pretrained(directory, trust_remote_code=options["trust_remote_code"])
        options["config"].quantization_config = InferenceConfig(directory, packed, masks)
        model, info = loader.from_pretrained(directory, **options)
        _check_class(directory, model, architecture(contents), info)
        keep_largest_activations(model, config.activation_topk)
        return model
    into_slots = by_layers and _can_fill_slots(config, kwargs)
    if into_slots:
        options["config"] = AutoConfig.from_pretrained(directory, trust_remote_code=options["trust_remote_code"])
        options["config"].quantization_config = LinkedWeightsConfig(
            directory, config, packed, masks, slots if in_slots else {}
        )
    elif in_slots:
        raise ValueError(
            f"{directory} is a checkpoint of a run with storage links, which is not loaded with allocation 'global' or "
            f"other options than {listed(sorted(KNOWN_OPTIONS))}: resume from it, and write it with export_sparse"
        )
    model, info = loader.from_pretrained(directory, **options)
    _check_class(directory, model, architecture(contents), info)
    keep_largest_activations(model, config.activation_topk)
    if into_slots:
        return _ready(model, directory, sparsity, compute)
    layers: dict[str, nn.Module] = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, PLAIN_LAYERS)
    }
    if packed:
        masks = packed_masks(packed, layers)
    else:
        for name in sorted(masks.keys() & layers.keys()):
            layer = layers[name]
            weight = masked_class(layer).matrix(layer.get_parameter("weight"))
            mask = masks[name]
            if weight.shape == mask.shape:  # else sparsify refuses it
                check_zeros(directory, name, weight, mask)
    sparsify(model, config, masks=masks)  # raises for masks that fit no layer
    return _ready(model, directory, sparsity, compute)


def _ready(
    model: PreTrainedModel, directory: Path, sparsity: SparsityConfig | None, compute: str | None
) -> PreTrainedModel:
    handle = SparsityHandle.of(model)
    # at its first update a run of another sparsity would prune or fill in one step what is to take many
    if handle is not None and sparsity is not None and sparsity.evolves:
        refuse_other_sparsity(str(directory), handle.layers, sparsity)
    return pack_model(model) if compute == "sparse" else model


def _can_fill_slots(config: SparsityConfig, kwargs: Mapping[str, Any]) -> bool:
    """Whether the layers keep slots, and the model can be made sparse before its weights are loaded."""
    needs_weights = config.is_dense or config.allocation == "global"
    return config.storage == "links" and not needs_weights and kwargs.keys() <= KNOWN_OPTIONS


def _check_class(directory: Path, model: PreTrainedModel, name: str | None, info: dict[str, Any]) -> None:
    """Raises ValueError if the model has another class, or if weights were missing or left over."""
    kind = type(model).__name__
    if kind != name:
        raise ValueError(f"{directory}: config.json names the class {name}, and transformers loads it as a {kind}")
    for keys, what in (("missing_keys", "no weights for"), ("unexpected_keys", "unexpected weights,")):
        if info[keys]:
            raise ValueError(
                f"{directory} has {what} {sorted(info[keys])[:3]} of a {kind}: its files are of different models, or "
                "were not copied completely. Restore config.json and weights from one export"
            )

"""Dense models to compare a sparse run with: of the same depth, and as small as the run is sparse.

The model's config gets an entry that says what it was made for. It is in the config.json of checkpoints and exports, so
that reports and evaluations can name the baseline.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_chts.config import SparsityConfig
from hf_chts.layers.shares import layer_links, most_links
from hf_chts.layers.targets import find_targets, matrix_shape
from hf_chts.narrower import narrower

BASELINES = ("none", "same_links", "same_average", "same_bytes")
ENTRY = "hf_chts_baseline"  # of the model's config

# Bytes of a trained fp32 weight with AdamW: itself, its gradient and two moments
_TRAINED = 16
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads")
# optimizers of transformers with two fp32 moments a weight
_TWO_MOMENTS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused")


def dense_baseline(
    kind: str, config: PreTrainedConfig, sparsity: SparsityConfig, *, max_steps: int = 0, optimizer: str = "adamw_torch"
) -> PreTrainedConfig:
    """The config of the dense model that stands beside a sparse run.

    Args:
        kind: same_links, as many weights in the layers that the run makes sparse as these have links in the end;
            same_average, as they have on the mean over the run's steps; same_bytes, as many bytes of weights, gradients
            and optimizer moments in the whole model as the run takes for these and its topology (fp32, AdamW).
        config: of the model that the run makes sparse; it is not changed.
        sparsity: of the run.
        max_steps: of the run, for same_average.
        optimizer: by its name in transformers, for same_bytes.

    Raises:
        ValueError: there is no such model, or what it depends on is not known.
    """
    if kind not in BASELINES[1:]:
        raise ValueError(f"unknown baseline {kind!r}. Known: {', '.join(BASELINES)}")
    if sparsity.is_dense:
        raise ValueError(
            f"baseline {kind} is a dense model that is as small as a sparse run: leave method and sparsity as they are "
            f"in that run, where method is {sparsity.method!r} now"
        )
    _check_sizes(config)
    outline = _outline(config)
    shapes = {name: matrix_shape(layer) for name, layer in find_targets(outline, sparsity).items()}
    if kind == "same_bytes":
        wanted = _training_bytes(outline, shapes, sparsity, optimizer) / _TRAINED
        names = None
    else:
        wanted = _average_links(shapes, sparsity, max_steps) if kind == "same_average" else _links(shapes, sparsity)
        names = list(shapes)
    width, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    step = 2 * width // math.gcd(2 * width, head)  # heads of even width, as rotary positions take them

    def count(width: int, ffn: int) -> int:
        return _weights(_outline(_sized(config, width, ffn)), names)

    try:
        found = narrower(width, config.intermediate_size, wanted, count, heads=heads, step=step)
    except ValueError as error:
        raise ValueError(f"there is no baseline {kind} for this run: {error}") from error
    made = _sized(config, *found)
    entry = {"kind": kind, "method": sparsity.method, "sparsity": sparsity.sparsity, "wanted": round(wanted)}
    if kind == "same_bytes":
        entry["storage"] = sparsity.storage
    setattr(made, ENTRY, entry | {"weights": count(*found), "parameters": _weights(_outline(made), None)})
    return made


def baseline_of(config: PreTrainedConfig | Mapping[str, Any]) -> str:
    """What a model's config, or the contents of its file, says of the run that it is a baseline of; empty if nothing.

    Such as "same_links of chtss at 90.00%".
    """
    entry = config.get(ENTRY) if isinstance(config, Mapping) else getattr(config, ENTRY, None)
    try:
        return f"{entry['kind']} of {entry['method']} at {entry['sparsity']:.2%}" if entry else ""
    except (TypeError, KeyError, ValueError):  # anybody may write such an entry
        return ""


def baseline_line(config: PreTrainedConfig) -> str:
    """What the baseline is made of, for the console."""
    entry = getattr(config, ENTRY)
    where = "the whole model" if entry["kind"] == "same_bytes" else "the layers that the run makes sparse"
    return (
        f"baseline {baseline_of(config)}: dense, hidden_size {config.hidden_size}, intermediate_size "
        f"{config.intermediate_size}; {entry['weights']:,} weights in {where}, for {entry['wanted']:,}; "
        f"{entry['parameters']:,} parameters"
    )


def _check_sizes(config: PreTrainedConfig) -> None:
    missing = [name for name in _SIZES if not isinstance(getattr(config, name, None), int)]
    if missing:
        raise ValueError(
            f"a baseline is made narrower by {', '.join(_SIZES)}, and the config of this {config.model_type} has no "
            f"{', '.join(missing)}: give a LLaMA-like model"
        )


def _outline(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def _sized(config: PreTrainedConfig, width: int, ffn: int) -> PreTrainedConfig:
    made = copy.deepcopy(config)
    if getattr(config, "head_dim", None):
        made.head_dim = config.head_dim * width // config.hidden_size
    made.hidden_size, made.intermediate_size = width, ffn
    return made


def _weights(model: PreTrainedModel, names: list[str] | None) -> int:
    """The weights of these layers, or all parameters of the model."""
    if names is None:
        return sum(parameter.numel() for parameter in model.parameters())
    return sum(model.get_submodule(name).get_parameter("weight").numel() for name in names)


def _links(shapes: Mapping[str, tuple[int, int]], config: SparsityConfig, sparsity: float | None = None) -> int:
    # a global allocation shares out the same number, by weights that are not known yet
    apart = replace(config, allocation="uniform") if config.allocation == "global" else config
    return sum(layer_links(shapes, config.sparsity if sparsity is None else sparsity, apart, {}).values())


def _average_links(shapes: Mapping[str, tuple[int, int]], config: SparsityConfig, max_steps: int) -> float:
    if max_steps <= 0:
        raise ValueError(
            f"baseline same_average is the mean over a run's steps, and max_steps is {max_steps}: set it to the steps "
            "of the sparse run"
        )
    return config.plan(max_steps).average(lambda sparsity: _links(shapes, config, sparsity))


def _training_bytes(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, int]], config: SparsityConfig, optimizer: str
) -> float:
    """Bytes of weights, gradients, moments and topology in one process, without activations (docs/storage.md).

    Raises:
        ValueError: they are not known, or are more than those of the dense model.
    """
    if optimizer not in _TWO_MOMENTS:
        raise ValueError(
            f"baseline same_bytes counts the fp32 weights, gradients and two moments of AdamW, and optim is "
            f"{optimizer!r}: set optim to adamw_torch, or take baseline same_links"
        )
    everything, possible = _weights(model, None), sum(math.prod(shape) for shape in shapes.values())
    held, topology = float(possible), 1.0 * possible  # masks
    if config.storage == "links":
        if config.stores_weights or config.compute == "auto":
            what, value = ("compute", "auto") if config.compute == "auto" else ("regrown_weights", "historical")
            raise ValueError(
                f"baseline same_bytes: what {what} {value!r} takes with storage links depends on the run: set {what} "
                "to another value, or take baseline same_links"
            )
        slots = most_links(shapes, config, dict.fromkeys(shapes, 0))
        held = float(sum(slots.values()))
        position = {name: 4 if math.prod(shape) < 2**31 else 8 for name, shape in shapes.items()}
        # beside a link's position its place in the index of products with the links alone (docs/compute.md)
        index = 12 if config.compute == "sparse" else 0
        topology = float(sum(slots[name] * (position[name] + index) for name in shapes))
    elif config.stores_weights:
        topology += 4 * possible
    if config.ages_links:
        topology += 2 * held
    topology += possible / 8  # the links that were ever active
    taken = _TRAINED * (everything - possible + held) + topology
    if taken > _TRAINED * everything:
        masks = config.storage != "links" and not config.stores_weights  # which no sparsity makes smaller
        remedy = "Set storage: links" if masks else "Raise sparsity, or take baseline same_links"
        raise ValueError(
            f"baseline same_bytes: with storage {config.storage!r} the run takes {taken / 2**20:,.1f} MiB, more than "
            f"the {_TRAINED * everything / 2**20:,.1f} of the dense model of the same size, which is the baseline then "
            f"(method: dense). {remedy}"
        )
    return taken

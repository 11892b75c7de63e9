"""The junctions between layers in the decoder blocks of a transformers model, for percolation.

The residual stream couples no layers: every block reads it and adds to it, and it starts with dense embeddings. So the
inputs of q, k, v, gate and up, the outputs of o and down, and heads on top of the blocks are in no junction.

Links of q and k in a head that o does not read at all are useless too, but stay. That keeps the two junctions of an
attention independent.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_chts.layers.wrappers import named_originals
from hf_chts.topology.percolation import Junction, gated_mlp, query_key, value_output

# model_type → its blocks' classes, transformers.models.<this>Attention and <this>MLP. To add one, read its forward:
# logits are sums of q·k over the positions of a head, halves rotated by RoPE, normalised per head if at all; the MLP is
# down(act(gate)·up)
_BLOCKS = {
    "llama": "llama.modeling_llama.Llama",
    "mistral": "mistral.modeling_mistral.Mistral",
    "qwen2": "qwen2.modeling_qwen2.Qwen2",
    "qwen3": "qwen3.modeling_qwen3.Qwen3",
    "gemma3_text": "gemma3.modeling_gemma3.Gemma3",
}


def couplings(model: PreTrainedModel, layers: Collection[str]) -> list[Junction]:
    """The junctions of a model's masked layers, for `percolate` and `coupled_groups`.

    A layer of a junction that is not among `layers` is dense. Junctions in which no link could ever be removed, for
    example that of q and k where both have a bias, are left out.

    Biases: a row of q, k, v, gate or up without links but with a bias still gives a constant, so it makes no other
    neuron inactive; a row that nobody reads loses its links all the same.

    Args:
        model: a causal LM, or another head, of the LLaMA, Mistral, Qwen2, Qwen3 or Gemma 3 (text) family.
        layers: names of the masked layers, as in `named_modules`.

    Raises:
        ValueError: an architecture, block or layer whose coupling is not known, sizes that contradict the config,
            or a name that is no layer of the model.
    """
    attention, mlp = _block_classes(model)
    modules = named_originals(model)
    for layer in layers:
        if not isinstance(modules.get(layer), nn.Linear):
            raise ValueError(f"{layer} is no linear layer of {type(model).__name__}: give names of named_modules()")
    junctions: list[Junction] = []
    for name in dict.fromkeys(layer.rpartition(".")[0] for layer in layers):
        block = modules[name]
        kind = f"{type(block).__module__}.{type(block).__qualname__}"
        inside = [layer for layer in layers if layer.rpartition(".")[0] == name]
        if kind == attention:
            _only(inside, name, ("q_proj", "k_proj", "v_proj", "o_proj"))
            junctions += _attention_junctions(model, modules, name)
        elif kind == mlp:
            _only(inside, name, ("gate_proj", "up_proj", "down_proj"))
            junctions.append(_mlp_junction(model, modules, name))
        elif name:  # heads are in the model itself, and read the residual stream
            raise ValueError(_unknown(f"{inside[0]} in a {type(block).__name__}", "or leave it out of target_modules"))
    return [junction for junction in junctions if _can_remove(junction, layers)]


def _block_classes(model: PreTrainedModel) -> tuple[str, str]:
    """The full class names of a model's attention and MLP."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in _BLOCKS:
        raise ValueError(
            _unknown(f"{type(model).__name__} (model_type {kind!r})", f"or use a model of {', '.join(_BLOCKS)}")
        )
    for rope in _rope_parameters(model.config):
        if rope.get("partial_rotary_factor") not in (None, 1):
            factor = rope["partial_rotary_factor"]
            raise ValueError(
                _unknown(f"{type(model).__name__} with partial_rotary_factor {factor}", "or leave it at 1")
            )
    family = f"transformers.models.{_BLOCKS[kind]}"
    return f"{family}Attention", f"{family}MLP"


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    # one dict, or one for each type of attention layer (Gemma 3)
    return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]


def _attention_junctions(model: PreTrainedModel, modules: Mapping[str, Any], name: str) -> list[Junction]:
    config, block = model.config, modules[name]
    attention = _linears(modules, name, ("q_proj", "k_proj", "v_proj", "o_proj"))
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    _check_sizes(
        name,
        {
            "head_dim": (block.head_dim, head_dim),
            "q_proj.out_features": (attention["q_proj"].out_features, heads * head_dim),
            "k_proj.out_features": (attention["k_proj"].out_features, kv_heads * head_dim),
            "v_proj.out_features": (attention["v_proj"].out_features, kv_heads * head_dim),
            "o_proj.in_features": (attention["o_proj"].in_features, heads * head_dim),
        },
    )
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    constant = [f"{name}.{projection}" for projection, linear in attention.items() if linear.bias is not None]
    return [
        query_key(
            f"{name}.q_proj",
            f"{name}.k_proj",
            normalized=hasattr(block, "q_norm") or hasattr(block, "k_norm"),
            constant=constant,
            **sizes,
        ),
        value_output(f"{name}.v_proj", f"{name}.o_proj", constant=constant, **sizes),
    ]


def _mlp_junction(model: PreTrainedModel, modules: Mapping[str, Any], name: str) -> Junction:
    mlp = _linears(modules, name, ("gate_proj", "up_proj", "down_proj"))
    gate, up, down = mlp.values()
    neurons = model.config.intermediate_size
    _check_sizes(
        name,
        {
            "gate_proj.out_features": (gate.out_features, neurons),
            "up_proj.out_features": (up.out_features, neurons),
            "down_proj.in_features": (down.in_features, neurons),
        },
    )
    constant = [f"{name}.{projection}" for projection, linear in mlp.items() if linear.bias is not None]
    with torch.no_grad():
        if modules[name].act_fn(next(gate.parameters()).new_zeros(1)).item() != 0:
            constant.append(f"{name}.gate_proj")
    names = [f"{name}.{projection}" for projection in mlp]
    return gated_mlp(*names, neurons=neurons, constant=constant)


def _linears(modules: Mapping[str, Any], name: str, projections: tuple[str, ...]) -> dict[str, nn.Linear]:
    linears = {}
    for projection in projections:
        linear = modules.get(f"{name}.{projection}")
        if not isinstance(linear, nn.Linear):
            kind = type(linear).__name__
            raise ValueError(_unknown(f"{name}, whose {projection} is a {kind}", "or make it a linear layer"))
        linears[projection] = linear
    return linears


def _check_sizes(name: str, sizes: dict[str, tuple[Any, int]]) -> None:
    for what, (found, expected) in sizes.items():
        if found != expected:
            raise ValueError(
                _unknown(f"{name}, whose {what} is {found}", f"or make it {expected}, as the config has it")
            )


def _only(layers: list[str], name: str, projections: tuple[str, ...]) -> None:
    for layer in layers:
        if layer.rpartition(".")[2] not in projections:
            raise ValueError(_unknown(layer, "or leave it out of target_modules"))


def _can_remove(junction: Junction, layers: Collection[str]) -> bool:
    """Whether a neuron can become inactive at one end and have links at another."""
    ends = [end for end in junction.ends if end.layer in layers]
    return any(not end.constant and other is not end for end in ends for other in ends)


def _unknown(what: str, hint: str) -> str:
    return f"percolation is not known for {what}: set percolation to false, {hint}"

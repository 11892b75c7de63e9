"""AbsTopK: of the activations at some places of LLaMA-like blocks only those of the largest magnitude stay.

The places are those of arXiv 2511.13653: after each norm, after q, k and v, after the MLP's activation (before
down_proj), and what attention and MLP add to the residual stream. Hooks on the modules do it, so that the model keeps
its class, its weights and their names; plain transformers, which has no such hooks, computes something else with them.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# the attribute of a model that holds the handles of its hooks
_HOOKS = "_hf_chts_activations"
_NORMS = ("input_layernorm", "post_attention_layernorm")
_PARTS = {*_NORMS, "self_attn", "mlp"}


def abs_top_k(values: Tensor, share: float) -> Tensor:
    """`values` (…, n) with all but the round(share·n) of the largest magnitude along the last dimension, at least one,
    set to 0."""
    stay = max(1, round(share * values.shape[-1]))
    places = values.abs().topk(stay, dim=-1, sorted=False).indices
    kept = torch.zeros_like(values, dtype=torch.bool).scatter_(-1, places, True)
    return torch.where(kept, values, 0)


def keep_largest_activations(model: nn.Module, share: float) -> None:
    """Put AbsTopK into every block of a LLaMA-like model, in the place of any that it has; share 1 takes it out.

    Args:
        share: of the activations at each place that stays, in (0, 1].

    Raises:
        ValueError: the model has no blocks like LLaMA's. Nothing is changed then.
    """
    blocks = [] if share == 1 else _blocks(model)
    for handle in getattr(model, _HOOKS, []):
        handle.remove()
    handles = []
    output, inputs = partial(_of_output, share), partial(_of_input, share)
    for block in blocks:
        attention, mlp = block.self_attn, block.mlp
        after = [*(getattr(block, norm) for norm in _NORMS)]
        after += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.down_proj]
        handles += [module.register_forward_hook(output) for module in after]
        handles.append(mlp.down_proj.register_forward_pre_hook(inputs))
    object.__setattr__(model, _HOOKS, handles)


def _of_output(share: float, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return abs_top_k(output, share)


def _of_input(share: float, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (abs_top_k(args[0], share), *args[1:])


def _blocks(model: nn.Module) -> list[Any]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    blocks = [block for blocks in lists for block in blocks if {name for name, _ in block.named_children()} == _PARTS]
    right = [
        block
        for block in blocks
        if all(hasattr(block.self_attn, f"{one}_proj") for one in "qkvo") and hasattr(block.mlp, "down_proj")
    ]
    if not right or len(right) < len(blocks):
        raise ValueError(
            f"activation_topk knows blocks like LLaMA's (self_attn with q_proj, k_proj, v_proj and o_proj, mlp with "
            f"down_proj, and the two norms before them), which {type(model).__name__} has not: leave it out, or use a "
            "model such as LLaMA, Mistral or Qwen2"
        )
    return right

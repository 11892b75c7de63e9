"""Weights outside sparse layers of which only the largest stay: embeddings, biases and norms (arXiv 2511.13653).

They need no mask. A step moves all of them, and then those that are not among the largest are 0 again, so that what
stays follows from the weights alone.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from hf_chts.layers.sparse_layer import SparseLayer
from hf_chts.topology.allocation import links_at


def other_weights(model: nn.Module, kinds: Collection[str]) -> list[Tensor]:
    """The trained weights of these kinds, each once, in the model's order.

    Args:
        model: with its sparse layers; their weights are left out, their biases are not.
        kinds: of "embeddings" (tables of tokens and positions, and heads on top of the model), "biases", "norms" (other
            parameters of one dimension that are called weight).

    Raises:
        ValueError: the model has none of a kind.
    """
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    found: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = None
            if isinstance(module, nn.Embedding) or (module is head and name == "weight"):
                kind = "embeddings" if not isinstance(module, SparseLayer) else None
            elif name == "bias":
                kind = "biases"
            elif name == "weight" and parameter.dim() == 1:
                kind = "norms"
            if kind in found and parameter.requires_grad:
                found[kind].append(parameter)
    for kind, parameters in found.items():
        if not parameters:
            raise ValueError(f"also_sparse has {kind!r}, and {type(model).__name__} trains none: leave it out")
    return list({id(one): one for parameters in found.values() for one in parameters}.values())


@torch.no_grad()
def keep_largest(weights: Iterable[Tensor], sparsity: float) -> tuple[int, int]:
    """Set all but the largest of each tensor to 0; at least one stays.

    Args:
        weights: of any shape.
        sparsity: the share that becomes 0.

    Returns:
        (the weights that may be other than 0, all weights) of all tensors together.
    """
    kept = total = 0
    for weight in weights:
        stay = max(1, links_at(weight.numel(), sparsity))
        if stay < weight.numel():
            flat = weight.reshape(-1)
            places = flat.abs().topk(stay, sorted=False).indices
            weight.copy_(torch.zeros_like(flat).index_copy_(0, places, flat[places]).view_as(weight))
        kept, total = kept + stay, total + weight.numel()
    return kept, total

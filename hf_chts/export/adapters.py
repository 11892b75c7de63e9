"""The plain model behind PEFT adapters: without them, or with them merged.

The live model does not change. PEFT is not imported: its layers are recognized by their attributes.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from hf_chts.layers.linked_layer import LinkedLayer
from hf_chts.layers.wrappers import is_adapted, uncompiled, unwrap, wrappers
from hf_chts.sparse_model import SparsityHandle

Adapters: TypeAlias = Literal["refuse", "merge", "merge_masked", "leave_out"]


@dataclass(frozen=True)
class PlainModel:
    """A model without its adapters.

    Attributes:
        state: its weights by the names of the plain model.
        masks: bool (out, in) by layer name.
        said: what merging did to the sparsity, for the log and the model card.
    """

    state: dict[str, Tensor]
    masks: dict[str, Tensor]
    said: str


def has_adapters(model: nn.Module) -> bool:
    """Whether a model, wrapped or not, has PEFT adapters."""
    return any(map(_is_peft, wrappers(model))) or any(map(is_adapted, unwrap(model).modules()))


def check_adapters(model: nn.Module, adapters: str) -> None:
    """Raises ValueError if `adapters` is not a choice, or is missing or impossible for this model."""
    if adapters not in get_args(Adapters):
        raise ValueError(f"adapters is {adapters!r}; choose one of {', '.join(map(repr, get_args(Adapters)))}")
    if not has_adapters(model):
        return
    if adapters == "refuse":
        raise ValueError(
            "the model has PEFT adapters, and an export is a plain model: choose adapters='merge', which adds them to "
            "the weights and makes those layers dense, adapters='merge_masked', which adds to links alone, or "
            "adapters='leave_out', which exports the model without them"
        )
    if adapters != "leave_out" and not any(map(is_adapted, unwrap(model).modules())):
        raise ValueError(
            f"adapters is {adapters!r}, but the model's adapters add tokens to its input, not to its weights: save "
            "them with model.save_pretrained, and export with adapters='leave_out'"
        )
    for name, module in unwrap(model).named_modules():
        if not is_adapted(module):
            continue
        if adapters != "leave_out" and getattr(module, "disable_adapters", False):
            raise ValueError(
                f"adapters is {adapters!r}, but the adapters of {name} are disabled: enable them (enable_adapters(), "
                "or leave the block of disable_adapter()), or export with adapters='leave_out'"
            )
        if getattr(module, "merged", False):
            raise ValueError(f"the adapters of {name} are merged into its weight: call unmerge_adapter() first")


def plain_model(sparse: SparsityHandle, adapters: str) -> PlainModel:
    """The plain model, after `check_adapters`.

    Raises:
        ValueError: merging would untie weights that the config ties.
    """
    state: dict[str, Tensor] = {}
    changed: set[str] = set()
    for name, module, adapted in _plain_modules(sparse.model, merge=adapters != "leave_out"):
        own: dict[str, Tensor] = {}
        module._save_to_state_dict(own, f"{name}." if name else "", False)  # without its children
        if isinstance(module, LinkedLayer):
            del own[f"{name}.{module.parameter_name}"]
            own[f"{name}.weight"] = module.weight.detach()
        state |= own
        changed |= {name} if adapted else set()
    _check_ties(sparse.model, state)
    masks = {name: mask.clone() for name, mask in sparse.topologies().items()}
    if adapters == "leave_out":
        return PlainModel(state, masks, "PEFT adapters left out")
    layers = [name for name in sparse.layers if name in changed]
    update = dropped = 0.0
    for name in layers:
        layer, key = sparse.layers[name], f"{name}.weight"
        merged = state[key]
        if adapters == "merge":
            masks[name] |= layer.matrix(merged).ne(0)
            continue
        mask = layer.matrix(layer.topology)
        change = (merged - cast(Tensor, layer.weight).detach()).float()
        update += float(change.square().sum())
        dropped += float(change[~mask].square().sum())
        state[key] = torch.where(mask, merged, 0)
    said = f"PEFT adapters merged into {len(layers)} of {len(sparse.layers)} sparse layers"
    if adapters == "merge":
        possible = sum(mask.numel() for mask in masks.values())
        after = 1 - sum(int(mask.count_nonzero()) for mask in masks.values()) / possible
        return PlainModel(state, masks, f"{said}: their sparsity falls from {sparse.sparsity():.2%} to {after:.2%}")
    share = (dropped / update) ** 0.5 if update else 0.0
    return PlainModel(state, masks, f"{said}, on links alone: {share:.1%} of what they add, by its norm, was dropped")


def _plain_modules(module: nn.Module, merge: bool, name: str = "") -> Iterator[tuple[str, nn.Module, bool]]:
    """Original name, module and whether it had an adapter, for all modules of the plain model."""
    module, adapted = uncompiled(module), False
    while is_adapted(module):
        module, adapted = uncompiled(_without_adapter(module, merge)), True
    yield name, module, adapted
    for child, inside in module.named_children():
        yield from _plain_modules(inside, merge, f"{name}.{child}" if name else child)


def _without_adapter(adapted: Any, merge: bool) -> nn.Module:
    """The layer inside one of PEFT's; if it is merged, a copy."""
    if not merge:
        return adapted.original_module if hasattr(adapted, "original_module") else adapted.get_base_layer()
    adapted = copy.deepcopy(adapted)
    for module in list(adapted.modules()):
        if hasattr(module, "keep_mask"):  # MaskedLora
            module.keep_mask()
        if isinstance(module, LinkedLayer):
            module.revert()  # what comes of a merge is dense
    # as PEFT's merge_and_unload does for each of them
    if hasattr(adapted, "unload_and_optionally_merge_module"):
        return adapted.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    adapted.merge(safe_merge=True)
    return adapted.get_base_layer()


def _is_peft(wrapper: nn.Module) -> bool:
    return hasattr(type(wrapper), "get_base_model")


def _check_ties(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Raises ValueError for weights that the config ties, and that the adapters made different."""
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        pair = [state.get(name), state.get(source)]
        if all(tensor is not None for tensor in pair) and not torch.equal(*pair):  # type: ignore[arg-type]
            raise ValueError(
                f"the adapters change {name} or {source}, which the config ties, so plain loading would use one for "
                "both: export with adapters='leave_out', or train a model with tie_word_embeddings false"
            )

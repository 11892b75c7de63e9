"""Find the model inside its wrappers, and the names of its modules and weights without them.

The only place that knows wrappers: torch.compile, activation checkpointing, data parallelism, DeepSpeed, PEFT, and any
other module that holds a transformers model and nothing else. Only torch is imported for them.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

# children under which torch keeps what it wraps, anywhere in a model; the names are torch's own
_INSERTED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# those under which a layer of PEFT keeps the layer that it adapts, and the one that it trains a copy of
_ADAPTED = ("base_layer", "original_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The model without its wrappers."""
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def wrappers(model: nn.Module) -> list[nn.Module]:
    """The wrappers of a model, the outermost first."""
    found = []
    while (inside := _inside(model)) is not None:
        found.append(model)
        model = inside
    return found


def uncompiled(model: nn.Module) -> nn.Module:
    """The model without torch's own wrappers for compiling and checkpointing."""
    children = model._modules
    inside = next((child for name in _INSERTED if (child := children.get(name)) is not None), None)
    return model if inside is None else uncompiled(inside)


def original_name(name: str) -> str:
    """The dotted name of a module or weight without the parts that torch's wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _INSERTED)


def named_originals(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by their names without wrappers and adapters, in the model's order.

    The name of a wrapped module stands for the module inside. Modules that an adapter adds keep their own names.
    """
    model = unwrap(model)
    originals: dict[str, nn.Module] = {}
    names: dict[str, str] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        before, _, last = name.rpartition(".")
        inside = last in _INSERTED or (last in _ADAPTED and is_adapted(modules[before]))
        original = names.get(before, "") if inside else ".".join(filter(None, (names.get(before), last)))
        names[name] = original
        originals[original] = module
    return originals


def is_adapted(module: nn.Module) -> bool:
    """Whether it is a layer of PEFT around a layer of the model."""
    return hasattr(module, "adapter_layer_names")


def added_by_adapters(model: nn.Module) -> set[nn.Module]:
    """The modules that PEFT has added to a model, such as the matrices of LoRA and copies of layers."""
    model = unwrap(model)
    return set(model.modules()).difference(_without_added(model))


def copied_by_adapters(model: nn.Module) -> set[nn.Module]:
    """The modules that run as copies, made by PEFT's modules_to_save."""
    copied: set[nn.Module] = set()
    for module in unwrap(model).modules():
        if is_adapted(module) and "modules_to_save" in module._modules:
            copied.update(module.get_submodule("original_module").modules())
    return copied


def saves_adapters_alone(model: nn.Module) -> bool:
    """Whether the Trainer saves PEFT's adapters alone, without the weights of the model."""
    while not isinstance(model, PreTrainedModel) and (inside := _running(model)) is not None:
        model = inside
    return hasattr(type(model), "get_base_model") or bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def original_keys(model: nn.Module) -> Iterator[None]:
    """Within the context, state dicts of `model` have original names, and are loaded by them.

    PEFT's own names stay, since PEFT looks for them.
    """
    # read from a state dict, since some wrappers rename keys in their own hooks
    wrapped = {original_name(key): key for key in model.state_dict(keep_vars=True) if original_name(key) != key}

    def save(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        for key in list(state):  # all of them, so that their order stays
            state[original_name(key)] = state.pop(key)

    def load(module: nn.Module, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
        for key in list(state):
            name = original_name(key)  # it may have been saved under a wrapper that is gone
            state[wrapped.get(name, name)] = state.pop(key)

    with ExitStack() as stack:
        if wrapped:
            stack.callback(model.register_state_dict_post_hook(save).remove)
        stack.callback(model.register_load_state_dict_pre_hook(load).remove)
        yield


def _without_added(module: nn.Module) -> Iterator[nn.Module]:
    """A module and the modules inside it, without those that adapters add."""
    yield module
    for name, child in module.named_children():
        if name in _ADAPTED or not is_adapted(module):
            yield from _without_added(child)


def _inside(module: nn.Module) -> nn.Module | None:
    """The model inside a wrapper; None if `module` is not a wrapper."""
    if isinstance(module, PreTrainedModel):
        return None
    if (inside := _running(module)) is not None:
        return inside
    children = dict(module.named_children())
    if hasattr(type(module), "get_base_model"):  # PEFT's
        return module.get_base_model()  # type: ignore[operator]
    alone = len(children) == 1 and not module._parameters and not module._buffers
    if alone and isinstance(unwrap(next(iter(children.values()))), PreTrainedModel):
        return next(iter(children.values()))
    return None


def _running(module: nn.Module) -> nn.Module | None:
    """The model inside a wrapper that changes how it runs, and that the Trainer removes to save; else None."""
    if (inside := uncompiled(module)) is not module:
        return inside
    parallel = isinstance(module, DistributedDataParallel | nn.DataParallel)
    if parallel or type(module).__module__.startswith("deepspeed."):
        return module._modules.get("module")
    return None

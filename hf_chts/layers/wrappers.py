"""The model that wrappers hold, and the names that its modules and weights have without them.

The one place that knows wrappers: torch.compile, activation checkpointing, data parallelism, DeepSpeed, PEFT, and any
other module that holds a transformers model and nothing else. None of them is imported that is not torch's own.
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
    """The model itself, whatever it is wrapped in."""
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def wrappers(model: nn.Module) -> list[nn.Module]:
    """What a model is wrapped in, the outermost first."""
    found = []
    while (inside := _inside(model)) is not None:
        found.append(model)
        model = inside
    return found


def uncompiled(model: nn.Module) -> nn.Module:
    """The model without what torch itself wraps it in, compiled or checkpointed."""
    children = model._modules
    inside = next((child for name in _INSERTED if (child := children.get(name)) is not None), None)
    return model if inside is None else uncompiled(inside)


def original_name(name: str) -> str:
    """A dotted name of a module or weight without what torch's wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _INSERTED)


def named_originals(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by the names that they have, or had, without wrappers and adapters, in its order.

    Where a module is wrapped, the name is that of what is inside. What an adapter adds keeps its own name.
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
    """Whether it is one of PEFT's layers, around a layer of the model."""
    return hasattr(module, "adapter_layer_names")


def added_by_adapters(model: nn.Module) -> set[nn.Module]:
    """The modules that PEFT has put into a model beside its own, such as the matrices of LoRA and copies of layers."""
    model = unwrap(model)
    return set(model.modules()).difference(_without_added(model))


def copied_by_adapters(model: nn.Module) -> set[nn.Module]:
    """The modules of a model that PEFT's modules_to_save has made copies of, which run instead of them."""
    copied: set[nn.Module] = set()
    for module in unwrap(model).modules():
        if is_adapted(module) and "modules_to_save" in module._modules:
            copied.update(module.get_submodule("original_module").modules())
    return copied


def saves_adapters_alone(model: nn.Module) -> bool:
    """Whether the Trainer saves the adapters of PEFT alone, and not the weights of the model that they are on."""
    while not isinstance(model, PreTrainedModel) and (inside := _running(model)) is not None:
        model = inside
    return hasattr(type(model), "get_base_model") or bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def original_keys(model: nn.Module) -> Iterator[None]:
    """Inside, state dicts of `model` have original names, and load by them, whoever asks for them or loads them.

    PEFT's own names stay: it looks for them.
    """
    # asked for, since some wrappers rename in their own hooks
    wrapped = {original_name(key): key for key in model.state_dict(keep_vars=True) if original_name(key) != key}

    def save(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        for key in list(state):  # every one of them, so that their order stays
            state[original_name(key)] = state.pop(key)

    def load(module: nn.Module, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
        for key in list(state):
            name = original_name(key)  # it may have been saved under a wrapper that is not there now
            state[wrapped.get(name, name)] = state.pop(key)

    with ExitStack() as stack:
        if wrapped:
            stack.callback(model.register_state_dict_post_hook(save).remove)
        stack.callback(model.register_load_state_dict_pre_hook(load).remove)
        yield


def _without_added(module: nn.Module) -> Iterator[nn.Module]:
    """A module and those inside it, without what adapters add."""
    yield module
    for name, child in module.named_children():
        if name in _ADAPTED or not is_adapted(module):
            yield from _without_added(child)


def _inside(module: nn.Module) -> nn.Module | None:
    """What a wrapper of a whole model wraps; None where `module` is no wrapper."""
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
    """What a wrapper wraps that says how a model is run, and that the Trainer takes off to save; None for others."""
    if (inside := uncompiled(module)) is not module:
        return inside
    parallel = isinstance(module, DistributedDataParallel | nn.DataParallel)
    if parallel or type(module).__module__.startswith("deepspeed."):
        return module._modules.get("module")
    return None

"""Which layers of a model become sparse, and why the others stay dense.

By default the linear projections of the model's blocks are sparse, except those in `_why_dense`.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_chts.config import SparsityConfig
from hf_chts.layers.masked_linear import PLAIN_LAYERS
from hf_chts.layers.own_classes import computes_a_product
from hf_chts.layers.plain_weight import check_plain
from hf_chts.layers.shares import matching
from hf_chts.layers.wrappers import added_by_adapters, copied_by_adapters, named_originals, original_name
from hf_chts.names import listed

# A layer with fewer inputs or outputs stays dense by default: at the sparsities that are usual its neurons would have
# hardly a link each, and there is nothing to save. In a toy model, a sixteenth of its widest layer takes its place
SMALLEST_SIDE = 16

_ROUTER = re.compile(r"router")
# with fewer outputs than inputs: gates of experts or heads, not those of gated MLPs, which have one output a neuron
_GATE = re.compile(r"gate|wg|.*_gate")
_ADAPTER = re.compile(r"(.*_)?(lora|adapters?)(_.*)?", re.IGNORECASE)
# what sets the step, input and output of a state-space model, and the decay and rate of linear attention, by their
# names in transformers
_STATE_SPACE = ("x_proj", "dt_proj")
_DECAY = ("in_proj_a", "in_proj_b", "in_proj_ba", "a_proj", "b_proj")


def find_targets(model: nn.Module, config: SparsityConfig) -> dict[str, nn.Module]:
    """The layers that `config` makes sparse, by name, in the model's order.

    Raises:
        ValueError: see `sparsify`.
    """
    modules, linears, added = _parts(model)
    if config.target_modules is None:
        targets = _by_default(model, modules, linears)
    else:
        targets = _matching("target_modules", config.target_modules, linears, added)
    if config.exclude_modules:
        excluded = _matching("exclude_modules", config.exclude_modules, linears, added)
        targets = {name: linear for name, linear in targets.items() if name not in excluded}
        if not targets:
            raise ValueError(
                f"exclude_modules {config.exclude_modules} leaves no layer to make sparse: name fewer, or use method "
                "dense"
            )
    check_targets(model, targets)
    return targets


def earlier_targets(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that earlier versions made sparse by default, which left out fewer layers of the blocks."""
    modules, linears, _ = _parts(model)
    blocks = _block_prefixes(modules)
    return {name: linear for name, linear in linears.items() if name.startswith(blocks)}


def why_dense(model: nn.Module, config: SparsityConfig, sparse: Collection[str]) -> dict[str, str]:
    """The reason why each linear layer outside `sparse` is dense, by name, in the model's order."""
    modules, linears, added = _parts(model)
    excluded = _matching("exclude_modules", config.exclude_modules or [], linears, added)
    reasons: dict[str, str | None] = dict.fromkeys(linears, "not in target_modules")
    if config.target_modules is None:
        reasons = _default_reasons(model, modules, linears)
    reasons |= dict.fromkeys(excluded, "exclude_modules")
    originals = named_originals(model)
    reasons |= {name: "adapter" for name in added if isinstance(originals[name], PLAIN_LAYERS)}
    return {name: reason or "not among the masks" for name, reason in reasons.items() if name not in sparse}


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of one of `PLAIN_LAYERS`, even if its weight is held in another form."""
    features = ("nf", "nx") if isinstance(layer, Conv1D) else ("out_features", "in_features")
    out, inn = (int(getattr(layer, name)) for name in features)
    return out, inn


def _parts(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module], list[str]]:
    """(the modules of a model without what adapters add, those that are linear layers, the names of what is added)."""
    originals, foreign = named_originals(model), added_by_adapters(model)
    modules = {name: module for name, module in originals.items() if module not in foreign}
    linears: dict[str, nn.Module] = {
        name: module for name, module in modules.items() if name and isinstance(module, PLAIN_LAYERS)
    }
    return modules, linears, [name for name in originals if name not in modules]


def _block_prefixes(modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Of the names in the repeated blocks of a model, which transformers keeps in `nn.ModuleList`s."""
    return tuple(
        f"{name}."
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and len(module) and not isinstance(module[0], PLAIN_LAYERS)
    )


def _by_default(
    model: nn.Module, modules: Mapping[str, nn.Module], linears: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """The linear layers of the blocks, without those that stay dense.

    Raises:
        ValueError: there are none, or some projections are parameters outside linear layers.
    """
    kind, blocks = type(model).__name__, _block_prefixes(modules)
    reasons = _default_reasons(model, modules, linears)
    found = {name: linear for name, linear in linears.items() if reasons[name] is None}
    if not any(name.startswith(blocks) for name in linears):
        raise ValueError(
            f"{kind} has no linear layers inside a list of blocks: name the layers in target_modules. Its linear "
            f"layers: {listed([name for name in linears if not _is_router(name, linears[name])])}"
        )
    if not found:
        why: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            if name.startswith(blocks):
                why.setdefault(str(reason), []).append(name)
        causes = "; ".join(f"{reason}: {listed(names)}" for reason, names in why.items())
        raise ValueError(
            f"{kind} has no linear layer that is sparse by default ({causes}): name layers in target_modules to make "
            "them sparse all the same"
        )
    towers = _towers(model, modules)
    for name, module in modules.items():
        if not name.startswith(blocks) or name.startswith(towers):
            continue
        for parameter, value in module.named_parameters(recurse=False):
            if _holds_matrices(module, value):
                raise ValueError(
                    f"{name} is a {type(module).__name__}, whose parameter {parameter} {tuple(value.shape)} holds "
                    "several matrices (of experts or heads): those cannot be masked and would stay dense. Name the "
                    f"layers to make sparse in target_modules. Linear layers in the blocks: {listed(_kinds(found))}"
                )
    return found


def _default_reasons(
    model: nn.Module, modules: Mapping[str, nn.Module], linears: Mapping[str, nn.Module]
) -> dict[str, str | None]:
    """Why each layer is dense by default; None for those that are sparse."""
    blocks, towers = _block_prefixes(modules), _towers(model, modules)
    widest = max((max(matrix_shape(layer)) for name, layer in linears.items() if name.startswith(blocks)), default=0)
    smallest = min(SMALLEST_SIDE, widest / SMALLEST_SIDE)
    reasons: dict[str, str | None] = {}
    for name, layer in linears.items():
        if not name.startswith(blocks):
            reasons[name] = "outside the blocks"
        elif name.startswith(towers):
            reasons[name] = "not in the text model"
        else:
            reasons[name] = _why_dense(name, layer, smallest)
    return reasons


def _why_dense(name: str, layer: nn.Module, smallest: float) -> str | None:
    """Why a layer in a block stays dense by default; None: it is sparse."""
    out, inn = matrix_shape(layer)
    *_, last = parts = name.split(".")
    if _is_router(name, layer):
        return "router or gate"
    if any(_ADAPTER.fullmatch(part) for part in parts):
        return "adapter"
    if last in _STATE_SPACE or (last in _DECAY and out < inn):
        return "sets a state space's step or decay"
    if min(out, inn) < smallest:
        return f"a side below {smallest:g}"
    return None


def _is_router(name: str, layer: nn.Module) -> bool:
    out, inn = matrix_shape(layer)
    gates = _GATE.fullmatch(name.rpartition(".")[2]) is not None and out < inn
    return gates or _ROUTER.search(name.lower()) is not None or "Router" in type(layer).__name__


def _towers(model: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Prefixes of the vision and audio towers of a model that has a text model.

    Towers are inner models with their own config that are not the text model and not for text alone.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or "text" not in _modalities(model):
        return ()
    try:
        text = type(config.get_text_config())
    except ValueError:  # it has several of them
        text = type(config)
    return tuple(
        f"{name}."
        for name, module in modules.items()
        if name
        and isinstance(module, PreTrainedModel)
        and type(module.config) not in (text, type(config))
        and _modalities(module) != ("text",)
    )


def _modalities(model: PreTrainedModel) -> tuple[str, ...]:
    given = model.input_modalities
    return (given,) if isinstance(given, str) else tuple(given)


def _kinds(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _holds_matrices(module: nn.Module, parameter: Tensor) -> bool:
    if isinstance(module, _ConvNd):
        return False
    stacked = parameter.dim() > 2 and min(parameter.shape[-2:]) > 1
    # DBRX has its experts one below the other
    return stacked or (parameter.dim() == 2 and "Expert" in type(module).__name__)


def _matching(
    field: str, patterns: list[str], linears: Mapping[str, nn.Module], added: list[str]
) -> dict[str, nn.Module]:
    found: set[str] = set()
    for pattern in patterns:
        matches = matching(linears, pattern)
        if not matches and (own := matching(added, pattern)):
            raise ValueError(
                f"{field} has {pattern!r}, which matches only what PEFT's adapters have put into the model: "
                f"{listed(own)}. Those stay dense: name layers of the model itself"
            )
        if not matches:
            names = [name for name, linear in linears.items() if not _is_router(name, linear)]
            raise ValueError(
                f"{field} has {pattern!r}, which matches no linear layer: give a suffix such as 'q_proj', or a "
                f"regular expression that matches a whole name. Linear layers: {listed(names)}"
            )
        found.update(matches)
    return {name: linear for name, linear in linears.items() if name in found}


def _of_own_class(model: nn.Module, name: str, targets: Mapping[str, nn.Module]) -> str:
    kind = type(targets[name])
    others = [other for other, layer in targets.items() if type(layer) is not kind]
    remedy = "name it, and others of its class, in exclude_modules to leave them dense"
    if not others:
        remedy = f"all layers that {type(model).__name__} would have sparse are, so it can only be trained dense"
    return (
        f"{name} is a {kind.__name__}, a class of its own whose forward does not give x·Wᵀ + b, so that a weight of 0 "
        f"is no missing link: {remedy}"
    )


def check_targets(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Raises ValueError, naming the layer, if a mask would not hold, or would affect more than the layer."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(original_name(name))
    copied = copied_by_adapters(model)
    for name, linear in targets.items():
        if linear in copied:
            raise ValueError(
                f"{name} has a copy that runs instead of it, of PEFT's modules_to_save: leave it out of that, or name "
                "it in exclude_modules"
            )
        check_plain(name, linear)
        if not computes_a_product(linear):
            raise ValueError(_of_own_class(model, name, targets))
        weight = linear.get_parameter("weight")
        shared = users.get(id(weight), [])
        if len(shared) > 1:
            raise ValueError(
                f"{name} shares its weight with {[s for s in shared if s != name + '.weight']}: a mask would "
                "reach those too. Untie them, or leave it dense (exclude_modules)"
            )
        if not weight.requires_grad:
            raise ValueError(f"{name} is frozen: unfreeze it, or leave it dense (exclude_modules)")

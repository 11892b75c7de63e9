"""What values the fields of a SparsityConfig take."""

import difflib
import re
from collections.abc import Iterable
from typing import Any, get_args, get_type_hints

from hf_chts.methods import CHOICES
from hf_chts.topology.parts import INITIAL_TOPOLOGIES, REGROWTH, SPARSITY_SCHEDULES

# kinds of weights outside sparse layers that topk can make sparse as well (hf_chts/layers/other_weights.py)
OTHER_WEIGHTS = ("embeddings", "biases", "norms")
_IN_WORDS = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}


def check_values(config: Any) -> None:
    """Check the fields of a SparsityConfig, all of which are set, and that they fit each other.

    Raises:
        ValueError: a value is out of range, not among the choices, or does not fit another one.
    """
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(unknown(name, getattr(config, name), choices))
    if not 0 < config.activation_topk <= 1 or (config.is_dense and config.activation_topk < 1):
        raise ValueError(
            f"activation_topk is {config.activation_topk}, with method {config.method!r}; it must lie in (0, 1], where "
            "1 keeps all activations, and be 1 for a dense model"
        )
    if config.is_dense:
        return
    for name in ("sparsity", "initial_sparsity"):
        value = getattr(config, name)
        if not (0 < value < 1 or (value == 0 and name == "initial_sparsity")):
            raise ValueError(
                f"{name} is {value}; it is a share of missing links strictly between 0 and 1 "
                "(0.9 keeps 10% of the links). For a dense model use method: dense"
            )
    shares = ("brf_r", "bsw_beta", "drop_fraction", "update_until", "sparsity_schedule_from", "sparsity_schedule_until")
    for name in shares:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must lie in [0, 1]")
    for name in ("softness_start", "softness_end"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must lie in [0, 1): T = δ/(1−δ)")
    if not config.update_interval > 0 or (config.update_interval > 1 and config.update_interval % 1):
        raise ValueError(
            f"update_interval is {config.update_interval}; it must be a whole number of steps, at least 1, or a "
            "fraction of the run between 0 and 1"
        )
    if config.initial_weights != "model" and "weight" in INITIAL_TOPOLOGIES[config.initial_topology].needs:
        raise ValueError(
            f"initial_weights is {config.initial_weights!r}, which would overwrite the weights that initial_topology "
            f"{config.initial_topology!r} chooses links by: leave initial_weights out, or choose another topology"
        )
    if config.regrown_warmup < 0 or (config.regrown_warmup > 1 and config.regrown_warmup % 1):
        raise ValueError(
            f"regrown_warmup is {config.regrown_warmup}; it must be a whole number of steps, or a fraction of "
            "update_interval between 0 and 1"
        )
    if config.compact_after_decay and (config.storage != "links" or config.allocation == "global"):
        raise ValueError(
            f"compact_after_decay is true, with storage {config.storage!r} and allocation {config.allocation!r}: it "
            "needs storage links, and numbers of links that stay. Set it to false"
        )
    if config.compute != "dense" and config.storage != "links":
        raise ValueError(
            f"compute is {config.compute!r}, with storage {config.storage!r}: products with the links alone need "
            "storage: links"
        )
    if config.dense_mib < 1:
        raise ValueError(f"dense_mib is {config.dense_mib}; it must be at least 1 MiB")
    if config.sigmoid_k <= 0:
        raise ValueError(f"sigmoid_k is {config.sigmoid_k}; it must be > 0 (the paper's is 6)")
    below = SPARSITY_SCHEDULES[config.sparsity_schedule].starts_below
    if below is not None and config.initial_sparsity != config.sparsity - below:
        starts = f"starts {below} below `sparsity`" if below else "stays at `sparsity`"
        raise ValueError(
            f"initial_sparsity is {config.initial_sparsity} and sparsity {config.sparsity}, but sparsity_schedule "
            f"{config.sparsity_schedule!r} {starts}: leave initial_sparsity out, or choose another schedule"
        )
    if config.changes_sparsity and not config.evolves:
        raise ValueError(
            f"sparsity_schedule is {config.sparsity_schedule!r}, but method {config.method!r} never updates its "
            "topology: choose a method that does, or sparsity_schedule: constant"
        )
    if config.changes_sparsity and config.sparsity_schedule_until > config.update_until:
        raise ValueError(
            f"sparsity_schedule_until is {config.sparsity_schedule_until} of the run, after the last topology update "
            f"at {config.update_until}: the target sparsity would never be reached. Lower it, or raise update_until"
        )
    if config.sparsity_schedule_from:
        _check_schedule_from(config)
    _check_missing_links(config)
    if config.selects and config.percolation:
        raise ValueError(
            f"percolation is true, but regrowth {config.regrowth!r} chooses all links at once, so that nothing is "
            "regrown after it: set percolation to false"
        )
    stored = [part for part in config.scores() if "stored" in part.needs]
    if stored and config.regrown_weights != "historical":
        raise ValueError(
            f"{stored[0].name!r} needs the weights of removed links, which regrown_weights "
            f"{config.regrown_weights!r} does not keep. Set regrown_weights: historical"
        )
    _check_pattern(config)
    if config.softness_schedule == "adaptive" and config.removal_choice != "soft":
        raise ValueError(
            f"softness_schedule is 'adaptive', but removal_choice is {config.removal_choice!r}: set removal_choice: "
            "soft, or softness_schedule: linear"
        )
    _check_patterns(config)


def _check_pattern(config: Any) -> None:
    """Whether what else the config says leaves every output or group of inputs its number of links."""
    pattern = config.links_pattern
    if pattern is None:
        return
    if config.percolation:
        raise ValueError(
            f"percolation is true, with pattern {config.pattern!r}, under which every output keeps its number of "
            "links: set percolation to false"
        )
    if config.selects and "choose" not in REGROWTH[config.regrowth].needs:
        raise ValueError(
            f"regrowth {config.regrowth!r} chooses links by itself, so that it cannot keep to pattern "
            f"{config.pattern!r}: set pattern: none, or take another regrowth (one of your own is to ask for `choose`)"
        )
    if pattern.sparsity is None:
        return
    if abs(config.sparsity - pattern.sparsity) > 1e-9:
        raise ValueError(
            f"sparsity is {config.sparsity}, but under pattern {config.pattern!r} it is {pattern.sparsity:g}: set "
            f"sparsity: {pattern.sparsity:g}, or choose another pattern"
        )
    if config.changes_sparsity:
        raise ValueError(
            f"sparsity_schedule is {config.sparsity_schedule!r} (method {config.method!r}), but under pattern "
            f"{config.pattern!r} the sparsity is constant: set sparsity_schedule: constant, or choose a method whose "
            "sparsity is, such as chts"
        )
    if config.allocation != "uniform" or config.overrides:
        raise ValueError(
            f"allocation is {config.allocation!r} and layer_sparsity {config.layer_sparsity!r}, but under pattern "
            f"{config.pattern!r} every layer has the sparsity {pattern.sparsity:g}: set allocation: uniform and leave "
            "layer_sparsity out"
        )


def _check_schedule_from(config: Any) -> None:
    start, end, schedule = config.sparsity_schedule_from, config.sparsity_schedule_until, config.sparsity_schedule
    if "start" not in SPARSITY_SCHEDULES[schedule].needs:
        raise ValueError(
            f"sparsity_schedule_from is {start}, but sparsity_schedule {schedule!r} has no beginning of its own: leave "
            "sparsity_schedule_from out, or choose another schedule"
        )
    if start >= end:
        raise ValueError(
            f"sparsity_schedule_from is {start} of the run, and sparsity_schedule_until {end}: sparsity must begin to "
            "rise before it has risen. Lower the one, or raise the other"
        )


def _check_missing_links(config: Any) -> None:
    """Check what concerns methods whose missing links train, or those alone."""
    if config.neuron_links < 0:
        raise ValueError(f"neuron_links is {config.neuron_links}; it must be at least 0, which sets no floor")
    others = config.also_sparse or []
    if unknown_kind := next((kind for kind in others if kind not in OTHER_WEIGHTS), None):
        raise ValueError(unknown("also_sparse", unknown_kind, OTHER_WEIGHTS))
    if not config.trains_missing:
        if others or (config.neuron_links and config.evolves):
            name, value = ("also_sparse", others) if others else ("neuron_links", config.neuron_links)
            raise ValueError(
                f"{name} is {value!r}, which needs missing links that train, and method {config.method!r} with "
                f"regrowth {config.regrowth!r} keeps them still: use method topk, or leave {name} out"
            )
        return
    if config.storage != "masked":
        raise ValueError(
            f"storage is {config.storage!r}, but with regrowth {config.regrowth!r} missing links have gradients and "
            "moments too, for which links storage has no room: set storage: masked"
        )
    if config.regrown_weights != "zero" or config.regrown_adam != "global_steps":
        raise ValueError(
            f"regrown_weights is {config.regrown_weights!r} and regrown_adam {config.regrown_adam!r}, but with "
            f"regrowth {config.regrowth!r} links come with the weight and the moments that training gave them: leave "
            "both out"
        )


def _check_patterns(config: Any) -> None:
    for name in ("target_modules", "exclude_modules", "layer_sparsity"):
        for pattern in getattr(config, name) or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{name} has {pattern!r}, which is not a regular expression: {error}") from error
    for pattern, sparsity in config.overrides.items():
        if not (isinstance(sparsity, float) and 0 < sparsity < 1):
            raise ValueError(
                f"layer_sparsity has {sparsity!r} for {pattern!r}; it must be a number strictly between 0 and 1. "
                "To keep layers dense, name them in exclude_modules"
            )


def check_types(config: Any) -> None:
    """Check the types of those fields that are set; whole numbers in fields of type float become floats.

    Raises:
        ValueError: a value has another type.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if value is None:
            continue
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(config, name, float(value))  # a config is frozen
        elif hint in (float, int, str, bool) and type(value) is not hint:
            advice = ": leave out the quotes" if isinstance(value, str) else ""
            if name == "pattern":
                advice = ', in quotes in YAML: "2:4" (it reads 2:4 as the number 124)'
            raise ValueError(f"{name} is {value!r}; it must be {_IN_WORDS[hint]}{advice}")
        elif name == "layer_sparsity":
            if not (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
                raise ValueError(f"{name} is {value!r}; it must map module names or patterns to numbers")
        elif list[str] in get_args(hint) and not (
            isinstance(value, list) and value and all(isinstance(item, str) for item in value)
        ):
            raise ValueError(f"{name} is {value!r}; it must be a list of module names or patterns")


def unknown(what: str, value: Any, known: Iterable[str]) -> str:
    """The message for a value that is not among the known ones."""
    close = difflib.get_close_matches(str(value), list(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown {what} {value!r}{hint} Known: {', '.join(known)}"

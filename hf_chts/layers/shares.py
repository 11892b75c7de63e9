"""The number of links of each layer, and the layers that a pattern of the config matches."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from hf_chts.config import SparsityConfig
from hf_chts.files.reading import LazyMapping
from hf_chts.layers.sparse_layer import SparseLayer
from hf_chts.names import listed
from hf_chts.topology.allocation import allocate_links, links_at

_TOLERANCE = 1e-3  # of a sparsity: numbers of links are rounded


def layer_links(
    shapes: Mapping[str, tuple[int, int]],
    sparsity: float,
    config: SparsityConfig,
    weights: Mapping[str, Tensor],
    blocks: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """The number of links of each layer at a sparsity of the run.

    Args:
        shapes: (out, in) by layer name.
        sparsity: of all layers together, except those with their own sparsity (`layer_sparsity`).
        weights: (out, in) by layer name; read for allocation "global" alone, one at a time.
        blocks: the number of blocks of rows that evolve on their own, by layer name; 1 where absent. Allocation
            "global" leaves each block a link, and each output under fan_in.
    """
    own = overrides(shapes, config)
    rest = {name: shape for name, shape in shapes.items() if name not in own}
    links = {
        name: links_at(shape[0] * shape[1], own[name] * (sparsity / config.sparsity))
        for name, shape in shapes.items()
        if name in own
    }
    if config.allocation == "uniform":
        # each layer is rounded on its own, so that the total may be off by some links
        links |= {name: links_at(shape[0] * shape[1], sparsity) for name, shape in rest.items()}
    elif rest:
        scores = LazyMapping(lambda name: weights[name].detach().abs(), rest) if config.allocation == "global" else None
        least = None if scores is None else _fewest(rest, config, blocks)
        links |= allocate_links(rest, sparsity, config.allocation, scores, least)
    return {name: links[name] for name in shapes}


def _fewest(
    shapes: Mapping[str, tuple[int, int]], config: SparsityConfig, blocks: Mapping[str, int] | None
) -> dict[str, int]:
    by_output = config.links_pattern is not None
    return {name: rows if by_output else (blocks or {}).get(name, 1) for name, (rows, _) in shapes.items()}


def most_links(
    shapes: Mapping[str, tuple[int, int]], config: SparsityConfig, links: Mapping[str, int]
) -> dict[str, int]:
    """The largest number of links that each layer may have during a run, by name.

    With allocation "global", which depends on the weights: 1.5 times its initial number or its uniform share.

    Args:
        links: the initial number by layer name.
    """
    shared = config.allocation == "global"
    apart = replace(config, allocation="uniform") if shared else config
    ends = [layer_links(shapes, sparsity, apart, {}) for sparsity in (config.initial_sparsity, config.sparsity)]
    most = {name: max(links[name], *(end[name] for end in ends)) for name in shapes}
    return {name: min(n + n // 2, math.prod(shapes[name])) if shared else n for name, n in most.items()}


def refuse_other_sparsity(model: str, layers: Mapping[str, SparseLayer], config: SparsityConfig) -> None:
    """Raises ValueError if a model, of this name and with these layers, is sparser or denser than a run of `config`."""
    shapes = {name: layer.storage.shape for name, layer in layers.items()}
    # together the layers have as many links whatever the allocation, and this one reads no weights
    apart = replace(config, allocation="uniform", initial_topology="erdos_renyi")
    possible = sum(math.prod(shape) for shape in shapes.values())
    first, last = (
        1 - sum(layer_links(shapes, at, apart, {}).values()) / possible
        for at in (apart.initial_sparsity, apart.sparsity)
    )
    found = 1 - sum(layer.links for layer in layers.values()) / possible
    if not first - _TOLERANCE <= found <= last + _TOLERANCE:
        run = f"{first:.2%}" if first == last else f"{first:.2%} to {last:.2%}"
        raise ValueError(
            f"{model} is {found:.2%} sparse, and this run {run}: set sparsity: {found:.4g} to go on with its "
            "topology, or initial_topology: magnitude to choose links anew by its weights"
        )


def without_return(
    links: Mapping[str, int],
    held: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    config: SparsityConfig,
    weights: Mapping[str, Tensor],
    trained: Collection[str],
    blocks: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Limit the `links` of allocation "global" so that the layers in `trained` have no more together than they `held`.

    Otherwise their share could grow at the expense of layers that do not train.
    """
    own = overrides(shapes, config)
    sharing = {name: shapes[name] for name in shapes if name in trained and name not in own}
    most = sum(held[name] for name in sharing)
    if sum(links[name] for name in sharing) <= most:
        return dict(links)
    possible = sum(math.prod(shape) for shape in sharing.values())
    scores = LazyMapping(lambda name: weights[name].detach().abs(), sharing)
    least = {name: min(held[name], n) for name, n in _fewest(sharing, config, blocks).items()}
    return {**links, **allocate_links(sharing, 1 - most / possible, "global", scores, least)}


def sparsity_ahead(
    links: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    config: SparsityConfig,
    scheduled: float,
    trained: Collection[str] | None = None,
) -> float | None:
    """The sparsity of the run at which its layers have these numbers of links, if it is above `scheduled`; else None.

    If there is no such sparsity, the highest one at which no layer, or group of layers that share links, has fewer.

    Args:
        trained: the layers that count; the others keep their links. None: all. With allocation "global" the sparsity of
            these layers stands for that of the run, because the weights of its last update are unknown.
    """
    names = list(shapes) if trained is None else [name for name in shapes if name in trained]
    own = overrides(shapes, config)
    counted = [(links[name], math.prod(shapes[name]), own[name]) for name in names if name in own]
    rest = [name for name in names if name not in own]
    low, most, high = [], [], []  # a rounded number of links stands for an interval of sparsities
    if config.allocation == "global" and rest and len(names) < len(shapes):
        all_rest = [name for name in shapes if name not in own]
        if sum(links[name] for name in all_rest) == links_at(sum(math.prod(shapes[n]) for n in all_rest), scheduled):
            rest = []  # together they have as many as the schedule gives them, as in a new model
    if config.allocation == "uniform":
        counted += [(links[name], math.prod(shapes[name]), config.sparsity) for name in rest]
    elif config.allocation == "erdos_renyi" and rest and len(names) < len(shapes):
        # not in proportion to the weights of a part of the layers
        least, highest = _range_of_share(links, shapes, config, rest)
        low, most, high = [least], [least], [highest]
    elif rest:
        numel = sum(math.prod(shapes[name]) for name in rest)
        counted.append((sum(links[name] for name in rest), numel, config.sparsity))
    for bounds, half in ((low, 0.5), (most, 0), (high, -0.5)):
        bounds += [(1 - (n + half) / numel) * config.sparsity / final for n, numel, final in counted]
    if not low or scheduled > max(low) - 1e-12:
        return None
    return (max(low) + min(high)) / 2 if max(low) < min(high) else max(most)


def _range_of_share(
    links: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], config: SparsityConfig, names: Collection[str]
) -> tuple[float, float]:
    """The lowest and highest sparsity of the run at which these layers together have as many links as now."""
    number = sum(links[name] for name in names)

    def least(fits: Callable[[int], bool]) -> float:
        low, high = 0.0, config.sparsity
        for _ in range(44):
            middle = (low + high) / 2
            shared = layer_links(shapes, middle, config, {})
            if fits(sum(shared[name] for name in names)):
                high = middle
            else:
                low = middle
        return high

    return least(lambda n: n <= number), least(lambda n: n < number)


def overrides(names: Iterable[str], config: SparsityConfig) -> dict[str, float]:
    """The final sparsity of the layers that `config.layer_sparsity` names.

    Raises:
        ValueError: a pattern matches no layer, or two patterns match the same layer.
    """
    names = list(names)
    found: dict[str, str] = {}
    for pattern in config.overrides:
        matches = matching(names, pattern)
        if not matches:
            raise ValueError(
                f"layer_sparsity has {pattern!r}, which matches no sparse layer: give a suffix such as 'down_proj', or "
                f"a regular expression that matches a whole name. Sparse layers: {listed(names)}"
            )
        for name in matches:
            if name in found:
                raise ValueError(
                    f"layer_sparsity has {found[name]!r} and {pattern!r}, which both match {name}: make one narrower"
                )
            found[name] = pattern
    return {name: config.overrides[pattern] for name, pattern in found.items()}


def matching(names: Collection[str], pattern: str) -> list[str]:
    """The names that a pattern of the config matches: as a suffix of dotted names, or as a regular expression."""
    return [name for name in names if name == pattern or name.endswith("." + pattern) or re.fullmatch(pattern, name)]

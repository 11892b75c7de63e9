"""How many links each layer has."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import Tensor

from hf_chts.config import SparsityConfig
from hf_chts.files.reading import LazyMapping as Lazy
from hf_chts.topology.allocation import allocate_links, links_at


def layer_links(
    shapes: Mapping[str, tuple[int, int]],
    sparsity: float,
    config: SparsityConfig,
    weights: Mapping[str, Tensor],
) -> dict[str, int]:
    """The number of links of each layer where `sparsity` is that of the run at a step.

    Args:
        shapes: (out, in) of each layer by name.
        weights: (out, in) by name; read for allocation "global" alone, one at a time.
    """
    own = overrides(shapes, config)
    rest = {name: shape for name, shape in shapes.items() if name not in own}
    links = {
        name: links_at(shape[0] * shape[1], own[name] * (sparsity / config.sparsity))
        for name, shape in shapes.items()
        if name in own
    }
    if config.allocation == "uniform":
        # each layer to its own nearest link, whatever the total
        links |= {name: links_at(shape[0] * shape[1], sparsity) for name, shape in rest.items()}
    elif rest:
        scores = Lazy(lambda name: weights[name].detach().abs(), rest) if config.allocation == "global" else None
        links |= allocate_links(rest, sparsity, config.allocation, scores)
    return {name: links[name] for name in shapes}


def without_return(
    links: Mapping[str, int],
    held: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    config: SparsityConfig,
    weights: Mapping[str, Tensor],
    trained: Collection[str],
) -> dict[str, int]:
    """`links` of `layer_links` for allocation "global", but no more for what `trained` share than they `held` before.

    Their share of all links depends on weights: it may grow beside layers that do not train.
    """
    own = overrides(shapes, config)
    sharing = {name: shapes[name] for name in shapes if name in trained and name not in own}
    most = sum(held[name] for name in sharing)
    if sum(links[name] for name in sharing) <= most:
        return dict(links)
    possible = sum(math.prod(shape) for shape in sharing.values())
    scores = Lazy(lambda name: weights[name].detach().abs(), sharing)
    return {**links, **allocate_links(sharing, 1 - most / possible, "global", scores)}


def sparsity_ahead(
    links: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    config: SparsityConfig,
    scheduled: float,
    trained: Collection[str] | None = None,
) -> float | None:
    """The sparsity of a run at which its layers have these links, where that is above the `scheduled` one; else None.

    Where there is no such sparsity, the one at which no layer, or what layers share, has more.

    Args:
        trained: the layers that count, since the others keep their links; None: all. With allocation "global" their
            own sparsity stands for that of the run, whose weights at its last update are not known.
    """
    names = list(shapes) if trained is None else [name for name in shapes if name in trained]
    own = overrides(shapes, config)
    counted = [(links[name], math.prod(shapes[name]), own[name]) for name in names if name in own]
    rest = [name for name in names if name not in own]
    low, most, high = [], [], []  # links are rounded, so that a number of them stands for all sparsities between two
    if config.allocation == "global" and rest and len(names) < len(shapes):
        all_rest = [name for name in shapes if name not in own]
        if sum(links[name] for name in all_rest) == links_at(sum(math.prod(shapes[n]) for n in all_rest), scheduled):
            rest = []  # together they have what the schedule gives them, such as those of a new model
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
    """Between which sparsities of the run these layers share as many links as they have, up to the final sparsity."""
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
        ValueError: a pattern that matches no layer, or two that match one.
    """
    names = list(names)
    found: dict[str, str] = {}
    for pattern in config.overrides:
        matches = matching(names, pattern)
        if not matches:
            raise ValueError(
                f"layer_sparsity has {pattern!r}, which matches no sparse layer: give a suffix such as 'down_proj', or "
                f"a regular expression that matches a whole name. Sparse layers: {some(names)}"
            )
        for name in matches:
            if name in found:
                raise ValueError(
                    f"layer_sparsity has {found[name]!r} and {pattern!r}, which both match {name}: make one narrower"
                )
            found[name] = pattern
    return {name: config.overrides[pattern] for name, pattern in found.items()}


def matching(names: Collection[str], pattern: str) -> list[str]:
    """The names that a pattern of the config means: a suffix of the dotted name, or an expression for all of it."""
    return [name for name in names if name == pattern or name.endswith("." + pattern) or re.fullmatch(pattern, name)]


def some(names: Collection[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "") if names else "none"

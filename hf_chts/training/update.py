"""What a topology update does with the layers that one rank evolves: the config's parts put together."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor

from hf_chts.layers.patching import allocated
from hf_chts.schedule_plan import SchedulePlan
from hf_chts.topology import link_prediction, link_sampling, scores
from hf_chts.topology.allocation import links_at
from hf_chts.topology.evolution import Choice, Evolution, regrow, remove, reselect
from hf_chts.topology.percolation import Junction, percolate
from hf_chts.topology.random_streams import random_stream

# The parts that a config names
SCORES: dict[str, Callable[..., Tensor]] = {
    "magnitude": scores.magnitude,
    "relative_importance": scores.relative_importance,
    "mest": scores.mest,
    "random": scores.random,
    "gradient": scores.gradient,
    "ch2_l3n": link_prediction.ch2_l3n,
    "ch3_l3n": link_prediction.ch3_l3n,
    "ch3_1_l3n": link_prediction.ch3_1_l3n,
}
NEED_GRADIENT = ("mest", "gradient")
# soft regrowth that needs no scores
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ch2_l3n": link_sampling.sample_ch2_l3n,
    "ch3_l3n": link_sampling.sample_ch3_l3n,
}

# Layers that are evolved at a time in one process: each holds several copies of itself meanwhile
_WORKERS = 4
_T = TypeVar("_T")


@dataclass(frozen=True)
class TopologyUpdate:
    """An update at one step, of any of the layers.

    Attributes:
        plan: the run's schedules.
        step: finished optimizer steps.
        masks: bool (out, in) of all layers, by name in the model's order; read only.
        gradients: the dense gradients of the step by layer name, where the config needs them; else None.
        stored: the weights of what is no link by layer name, where they are kept.
        junctions: how layers are coupled, for percolation; none without it.
    """

    plan: SchedulePlan
    step: int
    masks: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]
    stored: Mapping[str, Tensor]
    junctions: Sequence[Junction]

    def evolve(self, group: Sequence[str], weights: Mapping[str, Tensor]) -> dict[str, Evolution]:
        """Evolve layers that are coupled, or one that is not; `weights` are theirs, (out, in), read only."""
        config, masks = self.plan.config, self.masks
        links = self._links
        if config.regrowth == "stored":
            return {
                name: reselect(
                    weights[name],
                    masks[name],
                    self.stored[name],
                    links=links[name],
                    generator=self._stream(name, "pruning"),
                )
                for name in group
            }
        stay, kept = {}, {}
        for name in group:
            stay[name], kept[name] = remove(
                weights[name],
                masks[name],
                links=links[name],
                drop_fraction=self.plan.drop_fraction(self.step),
                removal=Choice(
                    self._score(config.removal, name),
                    config.removal_choice == "soft",
                    self.plan.temperature(self.step),
                ),
                pruning=Choice(self._score(config.pruning, name)),
                streams=partial(self._stream, name),
            )
        junctions = [junction for junction in self.junctions if set(junction.layers) & set(group)]
        if junctions:
            kept = percolate(kept, junctions)
        return {
            name: regrow(
                masks[name],
                stay[name],
                kept[name],
                links=links[name],
                regrowth=Choice(
                    self._score(config.regrowth, name),
                    config.regrowth_choice == "soft",
                    sampler=SAMPLERS.get(config.regrowth),
                ),
                streams=partial(self._stream, name),
            )
            for name in group
        }

    @cached_property
    def _links(self) -> dict[str, int]:
        shapes = {name: (mask.shape[0], mask.shape[1]) for name, mask in self.masks.items()}
        sparsities = allocated(shapes, self.plan.sparsity(self.step), self.plan.config)
        return {name: links_at(mask.numel(), sparsities[name]) for name, mask in self.masks.items()}

    def _score(self, part: str, name: str) -> Callable[..., Tensor]:
        return partial(SCORES[part], grad=self.gradients[name]) if part in NEED_GRADIENT else SCORES[part]

    def _stream(self, name: str, purpose: str) -> torch.Generator:
        layer = list(self.masks).index(name)
        number = self.plan.number_of_updates(self.step)
        return random_stream(self.plan.config.topology_seed, number, layer, purpose, device=self.masks[name].device)


def in_threads(evolve: Callable[[list[str]], _T], groups: Sequence[list[str]], device: torch.device) -> Iterator[_T]:
    """`evolve` of every group, in order; some groups at a time where the work is done by CPU threads.

    An update is many small operations, which gain little from several threads each. Results do not depend on it: every
    layer has its own random streams.
    """
    threads = torch.get_num_threads()
    workers = min(threads, _WORKERS, len(groups))
    if workers <= 1 or device.type != "cpu":
        yield from map(evolve, groups)
        return
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            yield from pool.map(evolve, groups)
    finally:
        torch.set_num_threads(threads)  # MKL's number is not a thread's own


def update_cost(shape: Sequence[int], regrowth: str) -> float:
    """Roughly how many operations an update of a layer of `shape` (out, in) takes, to share layers out over ranks."""
    out_features, in_features = shape
    numel = out_features * in_features
    selection = 100.0 * numel
    if regrowth.endswith("_l3n"):
        return selection + 4.0 * numel * (out_features + in_features)
    return selection * math.log2(max(numel, 2)) / 16

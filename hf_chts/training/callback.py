"""TopologyCallback: when the topology evolves, and what is told about it."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_chts.checkpoint import TopologyState
from hf_chts.config import SparsityConfig
from hf_chts.layers.coupling import couplings
from hf_chts.layers.patching import SparseModel
from hf_chts.schedule_plan import SchedulePlan
from hf_chts.topology import link_prediction, link_sampling, scores
from hf_chts.topology.allocation import links_at
from hf_chts.topology.bits import count_bits, pack_bits
from hf_chts.topology.evolution import Choice, Evolution, regrow, remove, reselect
from hf_chts.topology.metrics import active_neuron_rate
from hf_chts.topology.percolation import Junction, anp_rate, coupled_groups, percolate
from hf_chts.topology.random_streams import random_stream
from hf_chts.training.sharding import ReplicatedWeights, exchange, mean_over_ranks, rank_and_world, share_out

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
# Layers that are evolved at a time in one process: each holds several copies of itself meanwhile
_WORKERS = 4
_T = TypeVar("_T")
NEED_GRADIENT = ("mest", "gradient")
# soft regrowth that needs no scores
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ch2_l3n": link_sampling.sample_ch2_l3n,
    "ch3_l3n": link_sampling.sample_ch3_l3n,
}


class TopologyCallback(TrainerCallback):
    """Evolves a sparse model after the optimizer steps that the config's plan names.

    The update happens in `on_step_end`: after the optimizer step, and before the same step's evaluation and checkpoint.

    Args:
        sparse: the patched model.
        log: called with a dict of figures after each update, for example `Trainer.log`.

    Attributes:
        history: the figures of each update so far, in order.
    """

    def __init__(self, sparse: SparseModel, log: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.sparse = sparse
        self.log = log
        self.history: list[dict[str, Any]] = []
        self.plan: SchedulePlan | None = None
        self.index = {name: index for index, name in enumerate(sparse.layers)}
        self.junctions: list[Junction] = []
        self.groups: list[list[str]] = []
        # links that were ever active, as bits: a bool would cost as much memory again as the masks
        self.explored = {name: pack_bits(mask) for name, mask in sparse.masks().items()}
        # weights of what is no link, where they are kept: those that links had when they left, 0 if there never was one
        self.stored: dict[str, Tensor] = {}
        if self.config.stores_weights:
            self.stored = {name: torch.zeros_like(layer.weight) for name, layer in sparse.layers.items()}

    @property
    def config(self) -> SparsityConfig:
        return self.sparse.config

    def state(self, step: int) -> TopologyState:
        """What a checkpoint after `step` has to keep."""
        return TopologyState(self.sparse.masks(), self.explored, self.stored, step, self.history)

    def restore(self, state: TopologyState) -> None:
        """Take over the state of a checkpoint; the weights are loaded by others."""
        for name, layer in self.sparse.layers.items():
            layer.mask.copy_(state.masks[name])
            self.explored[name] = state.explored[name].to(layer.mask.device)
            if self.stored:
                self.stored[name].copy_(state.stored[name])
        self.history = list(state.history)

    def prepare(self, max_steps: int) -> None:
        """Make the plan of a run of `max_steps` optimizer steps.

        Raises:
            ValueError: the schedules do not fit into the run, or percolation is not known for the model.
        """
        self.plan = self.config.plan(max_steps)
        names = list(self.sparse.layers)
        self.junctions = couplings(cast(PreTrainedModel, self.sparse.model), names) if self.config.percolation else []
        self.groups = coupled_groups(self.junctions, names)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.prepare(state.max_steps)
        self.sparse.check()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.plan is not None, "on_train_begin makes the plan"
        if self.config.needs_gradient and self.plan.is_update(state.global_step + 1):
            for layer in self.sparse.layers.values():
                layer.dense_gradient = torch.zeros_like(layer.weight)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        assert self.plan is not None
        if not self.plan.is_update(state.global_step):
            return
        figures = self.update(state.global_step, ReplicatedWeights(optimizer))
        if self.log is not None:
            # Trainer.log takes the step as logged, and the loss of this step would never be
            should_log = control.should_log
            self.log(figures)
            control.should_log = should_log

    @torch.no_grad()
    def update(self, step: int, weights: ReplicatedWeights) -> dict[str, Any]:
        """Evolve every layer once, as of `step`, and return the figures of the update."""
        assert self.plan is not None
        start = time.perf_counter()
        layers = self.sparse.layers
        rank, world_size = rank_and_world()
        costs = {
            group[0]: sum(update_cost(layers[name].mask.shape, self.config) for name in group) for group in self.groups
        }
        dealt = share_out(costs, world_size)
        owner = {name: dealt[group[0]] for group in self.groups for name in group}
        gradients: dict[str, Tensor | None] = {}
        for name, layer in layers.items():
            gradient, layer.dense_gradient = layer.dense_gradient, None
            gradients[name] = None if gradient is None else mean_over_ranks(gradient)
        mine = {}

        def evolve(group: list[str]) -> dict[str, Evolution]:
            whole = {name: weights.weight(layers[name]) for name in group}
            return self._evolve(group, step, whole, gradients)

        for results in _in_threads(evolve, [group for group in self.groups if dealt[group[0]] == rank]):
            for name, result in results.items():
                mine[name] = (result.mask, (result.pruned, result.removed, result.regrown, result.overlap))
        totals = [0.0, 0.0, 0.0, 0.0]
        for name, (mask, (pruned, removed, regrown, overlap)) in exchange(mine, layers, owner).items():
            weights.set_topology(layers[name], mask, self.stored.get(name))
            self.explored[name] |= pack_bits(mask)
            totals = [t + v for t, v in zip(totals, (pruned, removed, regrown, overlap * regrown), strict=True)]
        figures = self._figures(step, totals)
        figures["topology_seconds"] = round(time.perf_counter() - start, 4)
        self.history.append({"step": step, **figures})
        return figures

    def _evolve(
        self, group: list[str], step: int, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]
    ) -> dict[str, Evolution]:
        """One update of layers that are coupled, or of one that is not."""
        assert self.plan is not None
        config, plan, masks = self.config, self.plan, self.sparse.masks()
        links = {name: links_at(masks[name].numel(), plan.sparsity(step)) for name in group}
        streams = {name: partial(self._stream, step, name) for name in group}
        if config.regrowth == "stored":
            return {
                name: reselect(
                    weights[name],
                    masks[name],
                    self.stored[name],
                    links=links[name],
                    generator=streams[name]("pruning"),
                )
                for name in group
            }

        def score(part: str, name: str) -> Callable[..., Tensor]:
            return partial(SCORES[part], grad=gradients[name]) if part in NEED_GRADIENT else SCORES[part]

        stay, kept = {}, {}
        for name in group:
            soft = config.removal_choice == "soft"
            stay[name], kept[name] = remove(
                weights[name],
                masks[name],
                links=links[name],
                drop_fraction=plan.drop_fraction(step),
                removal=Choice(score(config.removal, name), soft, plan.temperature(step)),
                pruning=Choice(score(config.pruning, name)),
                streams=streams[name],
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
                    score(config.regrowth, name),
                    config.regrowth_choice == "soft",
                    sampler=SAMPLERS.get(config.regrowth),
                ),
                streams=streams[name],
            )
            for name in group
        }

    def _stream(self, step: int, name: str, purpose: str) -> torch.Generator:
        assert self.plan is not None
        key = (self.config.topology_seed, self.plan.number_of_updates(step), self.index[name], purpose)
        return random_stream(*key, device=self.sparse.layers[name].mask.device)

    def _figures(self, step: int, totals: list[float]) -> dict[str, Any]:
        pruned, removed, regrown, overlapping = totals
        masks = self.sparse.masks()
        neurons = {name: sum(mask.shape) for name, mask in masks.items()}
        active = sum(active_neuron_rate(mask) * neurons[name] for name, mask in masks.items())
        possible = sum(mask.numel() for mask in masks.values())
        explored = sum(count_bits(bits) for bits in self.explored.values())
        return {
            "sparsity": self.sparse.sparsity(),
            "itop": explored / possible,
            "overlap": overlapping / regrown if regrown else 0.0,
            "active_neurons": active / sum(neurons.values()),
            **({"active_neurons_percolated": anp_rate(masks, self.junctions)} if self.config.percolation else {}),
            "links_removed": int(pruned + removed),
            "links_regrown": int(regrown),
        }


def _in_threads(evolve: Callable[[list[str]], _T], groups: list[list[str]]) -> Iterator[_T]:
    """`evolve` of every group, in order; some groups at a time where the work is done by CPU threads.

    An update is many small operations, which gain little from several threads each. Results do not depend on it: every
    layer has its own random streams.
    """
    threads = torch.get_num_threads()
    workers = min(threads, _WORKERS, len(groups))
    if workers <= 1 or torch.get_default_device().type != "cpu":
        yield from map(evolve, groups)
        return
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            yield from pool.map(evolve, groups)
    finally:
        torch.set_num_threads(threads)  # MKL's number is not a thread's own


def update_cost(shape: torch.Size | tuple[int, ...], config: SparsityConfig) -> float:
    """Roughly how many operations an update of a layer of `shape` (out, in) takes, to share layers out over ranks."""
    out_features, in_features = shape
    numel = out_features * in_features
    selection = 100.0 * numel
    if config.regrowth.endswith("_l3n"):
        return selection + 4.0 * numel * (out_features + in_features)
    return selection * math.log2(max(numel, 2)) / 16

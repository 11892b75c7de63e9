"""TopologyCallback: when the topology evolves, and what is told about it."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_chts.checkpoint import TopologyState
from hf_chts.config import SparsityConfig
from hf_chts.layers.patching import SparseModel
from hf_chts.schedule_plan import SchedulePlan
from hf_chts.topology import link_prediction, link_sampling, scores
from hf_chts.topology.allocation import links_at
from hf_chts.topology.bits import count_bits, pack_bits
from hf_chts.topology.evolution import Choice, Evolution, evolve
from hf_chts.topology.metrics import active_neuron_rate
from hf_chts.topology.random_streams import random_stream
from hf_chts.training.sharding import ReplicatedWeights, exchange, rank_and_world, share_out

SCORES: dict[str, Callable[..., Tensor]] = {
    "magnitude": scores.magnitude,
    "relative_importance": scores.relative_importance,
    "random": scores.random,
    "ch2_l3n": link_prediction.ch2_l3n,
    "ch3_l3n": link_prediction.ch3_l3n,
}
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
        # links that were ever active, as bits: a bool would cost as much memory again as the masks
        self.explored = {name: pack_bits(mask) for name, mask in sparse.masks().items()}

    @property
    def config(self) -> SparsityConfig:
        return self.sparse.config

    def state(self, step: int) -> TopologyState:
        """What a checkpoint after `step` has to keep."""
        return TopologyState(self.sparse.masks(), self.explored, step, self.history)

    def restore(self, state: TopologyState) -> None:
        """Take over the state of a checkpoint; the weights are loaded by others."""
        for name, layer in self.sparse.layers.items():
            layer.mask.copy_(state.masks[name])
            self.explored[name] = state.explored[name].to(layer.mask.device)
        self.history = list(state.history)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.plan = self.config.plan(state.max_steps)
        self.sparse.check()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        assert self.plan is not None, "on_train_begin makes the plan"
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
        costs = {name: update_cost(layer.mask.shape, self.config) for name, layer in layers.items()}
        owner = share_out(costs, world_size)
        mine = {}
        for index, (name, layer) in enumerate(layers.items()):
            if owner[name] == rank:
                result = self._evolve(index, step, weights.weight(layer), layer.mask)
                mine[name] = (result.mask, (result.pruned, result.removed, result.regrown, result.overlap))
        totals = [0.0, 0.0, 0.0, 0.0]
        for name, (mask, (pruned, removed, regrown, overlap)) in exchange(mine, layers, owner).items():
            weights.set_topology(layers[name], mask)
            self.explored[name] |= pack_bits(mask)
            totals = [t + v for t, v in zip(totals, (pruned, removed, regrown, overlap * regrown), strict=True)]
        figures = self._figures(step, totals)
        figures["topology_seconds"] = round(time.perf_counter() - start, 4)
        self.history.append({"step": step, **figures})
        return figures

    def _evolve(self, index: int, step: int, weight: Tensor, mask: Tensor) -> Evolution:
        assert self.plan is not None
        config, plan = self.config, self.plan
        number = plan.number_of_updates(step)
        return evolve(
            weight,
            mask,
            links=links_at(mask.numel(), plan.sparsity(step)),
            drop_fraction=plan.drop_fraction(step),
            removal=Choice(SCORES[config.removal], config.removal_choice == "soft", plan.temperature(step)),
            regrowth=Choice(
                SCORES[config.regrowth], config.regrowth_choice == "soft", sampler=SAMPLERS.get(config.regrowth)
            ),
            pruning=Choice(SCORES[config.pruning]),
            streams=lambda purpose: random_stream(config.topology_seed, number, index, purpose, device=mask.device),
        )

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
            "links_removed": int(pruned + removed),
            "links_regrown": int(regrown),
        }


def update_cost(shape: torch.Size | tuple[int, ...], config: SparsityConfig) -> float:
    """Roughly how many operations an update of a layer of `shape` (out, in) takes, to share layers out over ranks."""
    out_features, in_features = shape
    numel = out_features * in_features
    selection = 100.0 * numel
    if config.regrowth.endswith("_l3n"):
        return selection + 4.0 * numel * (out_features + in_features)
    return selection * math.log2(max(numel, 2)) / 16

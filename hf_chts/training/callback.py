"""TopologyCallback: when the topology evolves, and what is told about it."""

import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_chts.checkpoint import TopologyState
from hf_chts.config import SparsityConfig
from hf_chts.layers.coupling import couplings
from hf_chts.layers.patching import SparseModel
from hf_chts.layers.shares import Lazy, layer_links
from hf_chts.schedule_plan import SchedulePlan
from hf_chts.topology.bits import count_bits, pack_bits
from hf_chts.topology.evolution import Evolution
from hf_chts.topology.metrics import active_neuron_rate
from hf_chts.topology.percolation import Junction, anp_rate, coupled_groups
from hf_chts.topology.softness import adapted, chance_overlap
from hf_chts.training.losses import UpdateLosses
from hf_chts.training.regrown_adam import RegrownAdam
from hf_chts.training.sharding import ReplicatedWeights, exchange, mean_over_ranks, rank_and_world, share_out
from hf_chts.training.update import TopologyUpdate, in_threads, update_cost


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
        self.junctions: list[Junction] = []
        self.groups: list[list[str]] = []
        self.losses = UpdateLosses()
        layers, config = sparse.layers, sparse.config
        # links that were ever active, as bits: a bool would cost as much memory again as the masks
        self.explored = {name: pack_bits(mask) for name, mask in sparse.masks().items()}
        # weights of what is no link, where they are kept: those that links had when they left, 0 if there never was one
        self.stored: dict[str, Tensor] = {}
        if config.stores_weights:
            self.stored = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
        self.softness = dict.fromkeys(layers, config.softness_start) if config.adapts_softness else {}
        self.adam: RegrownAdam | None = None
        if config.ages_links:
            self.adam = RegrownAdam({name: x.weight for name, x in layers.items()}, config.update_interval)

    @property
    def config(self) -> SparsityConfig:
        return self.sparse.config

    def state(self, step: int) -> TopologyState:
        """What a checkpoint after `step` has to keep."""
        born = self.adam.born if self.adam else {}
        return TopologyState(
            masks=self.sparse.masks(),
            explored=self.explored,
            stored=self._as_matrices(self.stored),
            step=step,
            history=self.history,
            born=self._as_matrices(born),
            softness=self.softness,
        )

    def restore(self, state: TopologyState) -> None:
        """Take over the state of a checkpoint; the weights are loaded by others."""
        for name, layer in self.sparse.layers.items():
            layer.topology.copy_(state.masks[name])
            self.explored[name] = state.explored[name].to(layer.mask.device)
            if self.stored:
                layer.matrix(self.stored[name]).copy_(state.stored[name])
        if self.adam:
            self.adam.restore(self._as_matrices(state.born))
        self.softness = dict(state.softness)
        self.history = list(state.history)

    def _as_matrices(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.sparse.layers[name].matrix(tensor) for name, tensor in tensors.items()}

    def prepare(self, max_steps: int) -> None:
        """Make the plan of a run of `max_steps` optimizer steps.

        Raises:
            ValueError: the schedules do not fit into the run, or percolation is not known for the model.
        """
        self.plan = self.config.plan(max_steps)
        if self.adam:
            self.adam.check_updates(self.plan.number_of_updates(max_steps))
        names = list(self.sparse.layers)
        self.junctions = couplings(cast(PreTrainedModel, self.sparse.model), names) if self.config.percolation else []
        self.groups = coupled_groups(self.junctions, names)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self.prepare(state.max_steps)
        if self.adam:
            self.adam.check(optimizer)
        self.sparse.check()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.plan is not None, "on_train_begin makes the plan"
        self.losses.begin(state.global_step, self.plan)
        if self.config.needs_gradient and self.plan.is_update(state.global_step + 1):
            for layer in self.sparse.layers.values():
                layer.dense_gradient = torch.zeros_like(layer.weight)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.adam:
            self.adam.correct(optimizer, state.global_step + 1)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        assert self.plan is not None
        figures = self.losses.end(state.global_step, self.plan)
        if self.plan.is_update(state.global_step):
            figures |= self.update(state.global_step, ReplicatedWeights(optimizer))
        if figures and self.log is not None:
            # Trainer.log takes the step as logged, and the loss of this step would never be
            should_log = control.should_log
            self.log(figures)
            control.should_log = should_log

    @torch.no_grad()
    def update(self, step: int, weights: ReplicatedWeights) -> dict[str, Any]:
        """Evolve every layer once, as of `step`, and return the figures of the update."""
        assert self.plan is not None
        start = time.perf_counter()
        layers, masks = self.sparse.layers, self.sparse.masks()
        rank, world_size = rank_and_world()
        costs = {
            group[0]: sum(update_cost(masks[name].shape, self.config.regrowth) for name in group)
            for group in self.groups
        }
        dealt = share_out(costs, world_size)
        owner = {name: dealt[group[0]] for group in self.groups for name in group}
        gradients: dict[str, Tensor | None] = {}
        for name, layer in layers.items():
            gradient, layer.dense_gradient = layer.dense_gradient, None
            gradients[name] = None if gradient is None else layer.matrix(mean_over_ranks(gradient))
        stored = self._as_matrices(self.stored)
        topology_update = TopologyUpdate(
            plan=self.plan,
            step=step,
            masks=masks,
            links=self._links(step, weights, stored),
            gradients=gradients,
            stored=stored,
            junctions=self.junctions,
            blocks=self.sparse.blocks,
            softness=self.softness,
        )

        def evolve(group: list[str]) -> dict[str, Evolution]:
            return topology_update.evolve(group, {n: layers[n].matrix(weights.weight(layers[n])) for n in group})

        mine = {}
        my_groups = [group for group in self.groups if dealt[group[0]] == rank]
        for results in in_threads(evolve, my_groups, next(iter(masks.values())).device):
            for name, result in results.items():
                mine[name] = (result.mask, (result.pruned, result.removed, result.regrown, result.overlap))
        totals = [0.0, 0.0, 0.0, 0.0]
        for name, (mask, (pruned, removed, regrown, overlap)) in exchange(mine, layers, owner).items():
            self._take_over(name, mask, weights, self.plan.number_of_updates(step))
            if self.softness and regrown:
                chance = chance_overlap(int(removed), int(regrown), mask.numel() - topology_update.links[name])
                self.softness[name] = adapted(self.softness[name], overlap, chance, self.config.softness_end)
            totals = [t + v for t, v in zip(totals, (pruned, removed, regrown, overlap * regrown), strict=True)]
        figures = self._figures(step, totals)
        figures["topology_seconds"] = round(time.perf_counter() - start, 4)
        self.history.append({"step": step, **figures})
        return figures

    def _links(self, step: int, weights: ReplicatedWeights, stored: Mapping[str, Tensor]) -> dict[str, int]:
        """The number of links of each layer after an update at `step`."""
        assert self.plan is not None
        layers, masks = self.sparse.layers, self.sparse.masks()
        shapes = {name: (mask.shape[0], mask.shape[1]) for name, mask in masks.items()}

        def whole(name: str) -> Tensor:
            weight = layers[name].matrix(weights.weight(layers[name]))
            return torch.where(masks[name], weight, stored[name]) if self.config.regrowth == "stored" else weight

        return layer_links(shapes, self.plan.sparsity(step), self.config, Lazy(whole, masks))

    def _take_over(self, name: str, mask: Tensor, weights: ReplicatedWeights, update: int) -> None:
        layer = self.sparse.layers[name]
        if self.adam:
            self.adam.regrow(name, layer.mask, layer.matrix(mask), update)
        weights.set_topology(layer, layer.matrix(mask), self.stored.get(name))
        self.explored[name] |= pack_bits(mask)

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
            **({"softness": sum(self.softness.values()) / len(self.softness)} if self.softness else {}),
        }

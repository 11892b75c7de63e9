"""TopologyCallback: when the topology evolves, and what is told about it."""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_chts.checkpoint import TopologyState
from hf_chts.checkpoint.run_identity import RunIdentity
from hf_chts.config import SparsityConfig
from hf_chts.evolution.first_step import check_first_step
from hf_chts.evolution.half_precision import refuse_half_precision
from hf_chts.evolution.regrown_adam import RegrownAdam
from hf_chts.evolution.update import TopologyUpdate, in_threads, update_cost
from hf_chts.finite import not_finite
from hf_chts.layers.coupling import couplings
from hf_chts.layers.patching import SparseModel
from hf_chts.layers.plain_weight import check_plain
from hf_chts.layers.shares import Lazy, layer_links, some, sparsity_ahead, without_return
from hf_chts.records.run_record import RunRecord
from hf_chts.records.update_figures import LayerUpdate, overall_figures
from hf_chts.schedule_plan import SchedulePlan
from hf_chts.sharding.detect import engine_of
from hf_chts.sharding.gradients import DenseGradient
from hf_chts.sharding.interface import Engine
from hf_chts.sharding.ranks import exchange, rank_and_world, share_out
from hf_chts.topology.bits import pack_bits
from hf_chts.topology.percolation import Junction, anp_rate, coupled_groups
from hf_chts.topology.softness import adapted, chance_overlap
from hf_chts.training.begin_lines import changed_lines, learning_rates, plan_line
from hf_chts.training.divergence import diverged
from hf_chts.training.held_tensors import read_by_update
from hf_chts.training.layer_lines import layer_lines
from hf_chts.training.losses import UpdateLosses
from hf_chts.training.same_on_ranks import compare_begin

_log = logging.getLogger(__name__)


class TopologyCallback(TrainerCallback):
    """Evolves a sparse model after the optimizer steps that the config's plan names.

    The update happens in `on_step_end`: after the optimizer step, and before the same step's evaluation and checkpoint.

    A training begins with the masks and weights that the model has, and with nothing else of an earlier one, unless
    `restore` was called. Its schedules begin at step 0 then, but sparsity never falls back: where the model is ahead
    of them, it stays until they have caught up.

    Args:
        sparse: the patched model.
        log: called with a dict of figures after each update, for example `Trainer.log`. None: they wait for whoever
            takes them with `take_figures`, and the step is logged, so that they can go with its loss: other people's
            callbacks read it from every log of training.
        say: called on rank 0 with a line about the plan in force, at the begin of training; None: logged as an info.

    Attributes:
        history: the figures of each update so far, in order.
        warmup: the steps over which the learning rate climbs back after each update; None: its schedule is not made.
        learning_rate: what the plan's line says about that.
        engine: what holds weights and moments; from the begin of training.
        record: what writes down each layer's updates in the run's folder; on rank 0, from the begin of training.
        identity, run_dir: of the run, and where it writes; None: not known, and into output_dir.
    """

    def __init__(
        self,
        sparse: SparseModel,
        log: Callable[[dict[str, Any]], None] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.sparse = sparse
        self.log = log
        self.say = say or _log.info
        self.plan: SchedulePlan | None = None
        self.engine: Engine | None = None
        self.record: RunRecord | None = None
        self.identity: RunIdentity | None = None
        self.run_dir: str | None = None
        self.junctions: list[Junction] = []
        self.groups: list[list[str]] = []
        self.owner: dict[str, int] = {}
        self.warmup: int | None = None
        self.learning_rate = "the learning rate has no warm-up after them"
        self._restored: TopologyState | None = None
        self._earlier_steps = 0
        self._said_layers = False
        self._first_step = False  # whether none has been taken since training began
        self._output_dir: str | None = None
        self._begin()

    def _begin(self) -> None:
        """All that a run keeps, as a checkpoint has it, or anew: nothing is left of an earlier run."""
        state, layers = self._restored, self.sparse.layers
        for name, layer in layers.items():
            layer.dense_gradient = None
            if state:
                layer.topology.copy_(state.masks[name])
        self.history: list[dict[str, Any]] = list(state.history) if state else []
        self.losses = UpdateLosses(state.loss_before_update if state else None)
        self.softness = dict.fromkeys(layers, self.config.softness_start) | (state.softness if state else {})
        # links that were ever active, as bits: a bool would cost as much memory again as the masks
        self.explored = {
            name: state.explored[name].to(layer.mask.device) if state else pack_bits(layer.topology)
            for name, layer in layers.items()
        }
        # weights of what is no link, where they are kept: those that links had when they left, 0 if there never was one
        self.stored: dict[str, Tensor] = {}
        self.adam: RegrownAdam | None = None
        # what the schedule, or its floor, had at the last update that took place; None: not known
        self.reached = state.sparsity if state else None
        self._said: set[str] = set()  # the layers of which it was said that they do not train
        self._waiting: dict[str, Any] = {}  # figures that are not logged yet

    @property
    def config(self) -> SparsityConfig:
        return self.sparse.config

    def state(self, step: int) -> TopologyState:
        """What a checkpoint after `step` has to keep. Collective; what ranks hold in parts is on rank 0 alone."""
        return TopologyState(
            masks=self.sparse.masks(),
            explored=self.explored,
            stored=self._gathered(self.stored),
            step=step,
            history=self.history,
            born=self._gathered(self.adam.born if self.adam else {}),
            softness=self.softness if self.config.adapts_softness else {},
            loss_before_update=self.losses.before,
            sparsity=self.reached,
            run=self.identity.id if self.identity else None,
        )

    def _gathered(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors (out, in) of what `Engine.store` made; on rank 0, and on the CPU where they are not whole."""
        whole = {}
        for name, piece in pieces.items():
            assert self.engine is not None, "there are pieces from the begin of training"
            layer = self.sparse.layers[name]
            (tensor,) = self.engine.gather([(layer, 0)], [piece])
            if tensor is not None:
                whole[name] = layer.matrix(tensor.cpu() if self.engine.sharded else tensor)
        like = next(iter(whole.values()), None)
        if like is not None:  # the file has them of all layers, and those that the optimizer has not have no pieces
            whole |= {n: like.new_zeros(m.shape) for n, m in self.sparse.masks().items() if n not in pieces}
        return whole

    def restore(self, state: TopologyState | None, *, max_steps: int = 0) -> None:
        """Have the next training go on with the state of a checkpoint; the weights are loaded by others.

        Args:
            state: the masks are set at once; None: take back an earlier call whose training did not end.
            max_steps: the length of the run that wrote it, where that is known.
        """
        self._restored, self._earlier_steps = state, max_steps
        if state is not None:
            self._begin()

    def plan_from(self, step: int, max_steps: int, trained: Collection[str] | None = None) -> SchedulePlan:
        """The plan of a run of `max_steps` optimizer steps that begins, or goes on, after `step` of them.

        Where the model is sparser than its schedule has it by then, because it comes from a run with another one,
        sparsity stays until the schedule has caught up.

        Args:
            trained: the layers that train; None: those that are not frozen.
        """
        config = self.config
        shapes = {name: (mask.shape[0], mask.shape[1]) for name, mask in self.sparse.masks().items()}

        def largest_piece(sparsity: float) -> list[int]:
            # global allocation, which would read the weights, does not ask
            links = layer_links(shapes, sparsity, config, {})
            return [-(-number // self.sparse.blocks.get(name, 1)) for name, number in links.items()]

        plan = config.plan(max_steps, links=largest_piece)
        if not plan.decay_end or config.initial_sparsity > config.sparsity:
            return plan
        update = plan.number_of_updates(step) * config.update_interval
        scheduled, ahead = plan.sparsity(update), self.reached
        if self._restored is None or ahead is None:
            if trained is None:
                trained = [name for name, layer in self.sparse.layers.items() if layer.weight.requires_grad]
            links = {name: layer.links for name, layer in self.sparse.layers.items()}
            ahead = sparsity_ahead(links, shapes, config, scheduled, trained)
        if ahead is None or ahead <= scheduled + 1e-12:
            return plan
        return config.plan(max_steps, floor=min(ahead, config.sparsity), links=largest_piece)

    def prepare(self, max_steps: int, engine: Engine, step: int = 0) -> None:
        """Make the plan of a run of `max_steps` optimizer steps on what holds weights and moments, after `step` steps.

        Raises:
            ValueError: the schedules do not fit into the run, percolation is not known for the model, or the optimizer
                steps on weights of half precision.
        """
        refuse_half_precision(
            {
                name: engine.held(layer)["weight"]
                for name, layer in self.sparse.layers.items()
                if engine.optimizes(layer)
            }
        )
        self._begin()
        self.engine = engine
        self.plan = self.plan_from(step, max_steps, engine.trained(self.sparse.layers))
        if self._restored is None:
            self.reached = self.plan.sparsity(step)
        names = list(self.sparse.layers)
        self.junctions = couplings(cast(PreTrainedModel, self.sparse.model), names) if self.config.percolation else []
        self.groups = coupled_groups(self.junctions, names)
        shapes = {name: mask.shape for name, mask in self.sparse.masks().items()}
        parts = (self.config.regrowth, self.config.regrowth_choice)
        dealt = share_out(
            {group[0]: sum(update_cost(shapes[name], *parts) for name in group) for group in self.groups},
            rank_and_world()[1],
        )
        self.owner = {name: dealt[group[0]] for group in self.groups for name in group}
        self.take_pieces()

    def take_pieces(self) -> None:
        """This rank's pieces of what a checkpoint had, or new ones; for one that is restored in the midst of training.

        Raises:
            ValueError: the run has more updates than can be told apart.
        """
        assert self.engine is not None
        assert self.plan is not None
        state, layers = self._restored, self.sparse.layers
        if self.config.ages_links:
            self.adam = RegrownAdam(layers, self.engine, self.config.update_interval)
            self.adam.check_updates(self.plan.number_of_updates(self.plan.max_steps))
        for name, layer in layers.items():
            if self.config.stores_weights and self.engine.optimizes(layer):
                saved = state.stored.get(name) if state else None
                piece = self.engine.store(layer) if saved is None else self.engine.cut(layer, layer.matrix(saved))
                self.stored[name] = piece
            if self.adam and state and name in state.born:
                self.adam.restore(name, layer.matrix(state.born[name]))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        compare_begin(state.max_steps, self.sparse.masks())
        engine = engine_of(self.sparse.model, self.sparse.layers, optimizer)
        self._refuse_copies()
        if self.config.ages_links:
            RegrownAdam.check(optimizer)
        self.prepare(state.max_steps, engine, state.global_step)
        if self._restored is None:  # the optimizer may have stepped on other masks: those of an earlier `train()`
            engine.forget_missing(self.sparse.layers.values())
        engine.check(self.sparse.layers)
        self._first_step, self._output_dir = True, args.output_dir
        assert self.plan is not None, "prepare makes the plan"
        trained = engine.trained(self.sparse.layers)
        if state.is_world_process_zero and not self._said_layers:
            self._said_layers = True
            for line in layer_lines(self.sparse):
                self.say(line)
        if state.is_world_process_zero and self.config.evolves:
            self._say_plan(self.plan, state.global_step, trained, learning_rates(optimizer, lr_scheduler))
        self.record = None
        if state.is_world_process_zero and args.output_dir:
            masks = self.sparse.masks()
            shapes = {name: (mask.shape[0], mask.shape[1]) for name, mask in masks.items()}
            run = self.identity.id if self.identity else None
            self.record = RunRecord(self.run_dir or args.output_dir, shapes, self.plan, run)
            self.record.begin(state.global_step, masks)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._restored = None
        if self.record is not None:
            self.record.end(state.global_step)

    def _say_plan(
        self, plan: SchedulePlan, step: int, trained: Collection[str], rates: tuple[float, float] | None
    ) -> None:
        self.say(plan_line(plan, self.learning_rate))
        earlier = None
        if self._restored is not None and self._earlier_steps not in (0, plan.max_steps):
            with suppress(ValueError):  # its length is refused today
                earlier = self.config.plan(self._earlier_steps)
        layers = [self.sparse.layers[name] for name in trained or self.sparse.layers]
        sparsity = 1 - sum(layer.links for layer in layers) / sum(layer.mask.numel() for layer in layers)
        reached = self.reached
        if reached is None and earlier is not None:
            reached = earlier.sparsity(step // plan.config.update_interval * plan.config.update_interval)
        if reached is None or not trained:
            reached = plan.config.sparsity
        for line in changed_lines(plan, step, sparsity, reached, earlier, rates):
            _log.warning(line)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.plan is not None, "on_train_begin makes the plan"
        assert self.engine is not None
        self.losses.begin(state.global_step, self.plan)
        if self.config.needs_gradient and self.plan.is_update(state.global_step + 1):
            for name, layer in self.sparse.layers.items():
                layer.dense_gradient = self.engine.dense_gradient(layer, self.owner[name])

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.engine is not None:
            self.engine.after_step(self.sparse.layers.values())
        if self.adam:
            self.adam.correct(optimizer, state.global_step + 1)
        if self._first_step and self.engine is not None:
            self._first_step = False
            check_first_step(self.engine, self.sparse.layers)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.plan is not None
        figures = self.losses.end(state.global_step, self.plan)
        if self.plan.is_update(state.global_step):
            figures |= self.update(state.global_step)
        if figures and self.log is not None:
            # Trainer.log takes the step as logged, and the loss of this step would never be
            should_log = control.should_log
            self.log(figures)
            control.should_log = should_log
        elif self.log is None:
            self._waiting |= figures
            # the losses around an update wait for the next log, unless the run ends or a checkpoint would be without
            last = control.should_save or state.global_step >= state.max_steps
            control.should_log |= bool(self._waiting) and (last or self.plan.is_update(state.global_step))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_log |= bool(self._waiting) and control.should_save

    def take_figures(self) -> dict[str, Any]:
        """The figures that are to be logged with the loss of this step; they are given once."""
        figures, self._waiting = self._waiting, {}
        return figures

    @torch.no_grad()
    def update(self, step: int) -> dict[str, Any]:
        """Evolve every layer that trains once, as of `step`, and return the figures of the update. Collective.

        Returns:
            The figures of all layers together; nothing where none trains.
        """
        assert self.plan is not None
        start = time.perf_counter()
        names = self._trained()
        if not names:
            return {}
        self._refuse_not_finite(step)
        links = self._links(step, names)
        self.reached = self.plan.sparsity(step)
        evolved: dict[str, list[float]] = {name: [0.0] * 4 for name in self.sparse.layers}
        for groups in self._rounds(names):
            for name, (mask, done) in self._evolve(groups, step, links):
                _, removed, regrown, overlap = done
                self._take_over(name, mask, self.plan.number_of_updates(step))
                if self.config.adapts_softness and regrown:
                    chance = chance_overlap(int(removed), int(regrown), mask.numel() - links[name])
                    self.softness[name] = adapted(self.softness[name], overlap, chance, self.config.softness_end)
                evolved[name] = done
        masks = self.sparse.masks()
        layers = {
            name: LayerUpdate.of(
                masks[name],
                self.explored[name],
                pruned=int(pruned),
                removed=int(removed),
                regrown=int(regrown),
                returned=round(overlap * regrown),
            )
            for name, (pruned, removed, regrown, overlap) in evolved.items()
        }
        figures = self._figures(layers, masks, names)
        seconds = time.perf_counter() - start
        figures["topology_seconds"] = round(seconds, 4)
        self.history.append({"step": step, **figures})
        if self.record is not None:
            self.record.update(step, layers, masks, seconds, self.softness if self.config.adapts_softness else {})
        return figures

    def _trained(self) -> Collection[str]:
        """The layers that train at this moment, the same on all ranks. Collective.

        The others do not evolve: links that come would stay 0. Of each of them that is said once.
        """
        assert self.engine is not None
        layers = self.sparse.layers
        for name, layer in layers.items():
            check_plain(name, layer)
        names = self.engine.trained(layers)
        still = [name for name in layers if name not in names]
        for name in still:
            layers[name].dense_gradient = None
        if not self._said.issuperset(still) and rank_and_world()[0] == 0:
            new = [name for name in still if name not in self._said]
            follows = (
                "so their topology does not evolve: their sparsity stays as it is, and that of all layers together may "
                "differ from the schedule's"
                if names
                else "so nothing evolves until one of them trains"
            )
            _log.warning("These sparse layers are frozen or not in the optimizer, %s: %s", follows, some(new))
        self._said.update(still)
        return names

    def _refuse_not_finite(self, step: int) -> None:
        """Raises FloatingPointError, naming them, for layers of which an update would read NaN or infinity."""
        assert self.engine is not None
        read = read_by_update(self.sparse.layers, self.engine, self.stored)
        if bad := not_finite(read, device=next(iter(self.sparse.layers.values())).mask.device):
            raise diverged(step, bad, self._output_dir, "the topology is not updated by them")

    def _refuse_copies(self) -> None:
        """Raises ValueError, naming them, for copies of sparse layers that would train and not evolve."""
        copies = [name for name, layer in self.sparse.copies().items() if layer.weight.requires_grad]
        if copies and self.config.evolves:
            raise ValueError(
                f"copies of sparse layers would train instead of the layers themselves, and their topology would not "
                f"evolve: {some(copies)}. Leave them out of PEFT's modules_to_save and train the layers without "
                "adapters, or use method static"
            )

    def _rounds(self, names: Collection[str]) -> list[list[list[str]]]:
        """The groups of layers, of those of `names`, that are evolved at a time.

        Where weights have to be gathered, each rank takes one group in a round, so that none holds more.
        """
        assert self.engine is not None
        groups = [[name for name in group if name in names] for group in self.groups]
        groups = [group for group in groups if group]
        if not self.engine.sharded:
            return [groups]
        by_rank: dict[int, list[list[str]]] = {}
        for group in groups:
            by_rank.setdefault(self.owner[group[0]], []).append(group)
        rounds = zip_longest(*(by_rank[rank] for rank in sorted(by_rank)))
        return [[group for group in together if group is not None] for together in rounds]

    def _evolve(
        self, groups: Sequence[list[str]], step: int, links: Mapping[str, int]
    ) -> Iterator[tuple[str, tuple[Tensor, list[float]]]]:
        """New masks, (out, in), and what was done, of the layers of `groups`; each rank works out its own."""
        assert self.plan is not None
        assert self.engine is not None
        engine, layers, masks = self.engine, self.sparse.layers, self.sparse.masks()
        rank, _ = rank_and_world()
        names = [name for group in groups for name in group]
        destinations = [(layers[name], self.owner[name]) for name in names]
        weights = self._matrices(names, engine.gather(destinations))
        stored = {}
        if self.stored:
            stored = self._matrices(names, engine.gather(destinations, [self.stored[name] for name in names]))
        gradients = {}
        if self.config.needs_gradient:
            gradients = self._matrices(names, [self._take_gradient(name) for name in names])
        topology_update = TopologyUpdate(
            plan=self.plan,
            step=step,
            masks=masks,
            links=links,
            gradients=gradients,
            stored=stored,
            junctions=self.junctions,
            blocks=self.sparse.blocks,
            softness=self.softness if self.config.adapts_softness else {},
        )

        def evolve(group: list[str]) -> dict[str, tuple[Tensor, list[float]]]:
            done = topology_update.evolve(group, {name: weights[name] for name in group})
            # as bits until they are needed: bools of all layers would be as much again as the masks
            return {
                name: (pack_bits(one.mask), [one.pruned, one.removed, one.regrown, one.overlap])
                for name, one in done.items()
            }

        mine: dict[str, tuple[Tensor, list[float]]] = {}
        my_groups = [group for group in groups if self.owner[group[0]] == rank]
        for results in in_threads(evolve, my_groups, next(iter(masks.values())).device):
            mine |= results
        return exchange(
            mine, {name: masks[name].shape for name in names}, self.owner, next(iter(masks.values())).device
        )

    def _matrices(self, names: Sequence[str], tensors: Sequence[Tensor | None]) -> dict[str, Tensor]:
        layers = self.sparse.layers
        return {n: layers[n].matrix(t.detach()) for n, t in zip(names, tensors, strict=True) if t is not None}

    def _take_gradient(self, name: str) -> Tensor | None:
        layer = self.sparse.layers[name]
        gradient, layer.dense_gradient = layer.dense_gradient, None
        assert isinstance(gradient, DenseGradient), f"no dense gradient of {name} was kept: on_step_begin asks for it"
        return gradient.mean()

    def _links(self, step: int, trained: Collection[str]) -> dict[str, int]:
        """The number of links of each layer after an update at `step`, were all of them to evolve.

        So a layer has as many whichever others are frozen, and what those keep is not shared out. But while sparsity
        rises, or stays until its schedule has caught up, no link comes back to the layers that train.
        """
        assert self.plan is not None
        plan, config = self.plan, self.config
        layers, masks = self.sparse.layers, self.sparse.masks()
        shapes = {name: (mask.shape[0], mask.shape[1]) for name, mask in masks.items()}

        def whole(name: str) -> Tensor:
            assert self.engine is not None
            layer = layers[name]
            weight = self.engine.whole(layer)
            if name in self.stored and self.config.regrowth == "stored":
                weight = torch.where(layer.mask, weight, self.engine.whole(layer, self.stored[name]))
            return layer.matrix(weight)

        weights = Lazy(whole, masks)
        links = layer_links(shapes, plan.sparsity(step), config, weights)
        rises = step <= plan.decay_end and config.initial_sparsity <= config.sparsity
        if config.allocation == "global" and rises and len(trained) < len(layers):
            held = {name: layer.links for name, layer in layers.items()}
            links = without_return(links, held, shapes, config, weights, trained)
        return links

    def _take_over(self, name: str, mask: Tensor, update: int) -> None:
        assert self.engine is not None
        layer = self.sparse.layers[name]
        if self.adam:
            self.adam.regrow(name, layer.mask, layer.matrix(mask), update)
        self.engine.set_topology(layer, layer.matrix(mask), self.stored.get(name))
        self.explored[name] |= pack_bits(mask)

    def _figures(
        self, layers: Mapping[str, LayerUpdate], masks: Mapping[str, Tensor], names: Collection[str]
    ) -> dict[str, Any]:
        return {
            **overall_figures(layers, {name: mask.shape for name, mask in masks.items()}),
            **({"active_neurons_percolated": anp_rate(masks, self.junctions)} if self.config.percolation else {}),
            **({"softness": fmean(self.softness[name] for name in names)} if self.config.adapts_softness else {}),
        }

"""TopologyCallback: runs an Evolver in transformers' Trainer, and reports what it did."""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_chts.checkpoint import TopologyState
from hf_chts.checkpoint.run_identity import RunIdentity
from hf_chts.evolution.evolver import Evolver
from hf_chts.evolution.update_figures import average_links
from hf_chts.evolution.update_ranks import NotFinite
from hf_chts.layers.sparse_layers import SparseLayers
from hf_chts.records.run_record import RunRecord
from hf_chts.training.begin_lines import changed_lines, layer_lines, learning_rates, plan_line, sequence_length
from hf_chts.training.divergence import diverged
from hf_chts.training.losses import UpdateLosses

_log = logging.getLogger(__name__)


class TopologyCallback(TrainerCallback):
    """Evolves a sparse model in a Trainer: after the optimizer step, before that step's evaluation and checkpoint.

    Args:
        sparse: the handle of the model.
        log: called with the figures of each update, for example `Trainer.log`. None: the step is logged, and its log
            gets them from `take_figures`, together with the loss.
        say: called on rank 0 with lines about layers and plan as training begins; None: they are logged as infos.

    Attributes:
        evolver: attached to the optimizer when training begins.
        losses: of the steps around updates.
        warmup: optimizer steps over which the learning rate climbs back after an update; None before the
            learning-rate schedule is made.
        learning_rate: the same as a phrase, for the line about the plan.
        scales_rate: whether the learning-rate schedule has its factor by density.
        record: writes each layer's updates into the run's folder; on rank 0, from the start of training.
        identity, run_dir: of the run, and where it writes; without a `run_dir`, into output_dir.
    """

    def __init__(
        self,
        sparse: SparseLayers,
        log: Callable[[dict[str, Any]], None] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.evolver = Evolver(sparse)
        self.log = log
        self.say = say or _log.info
        self.losses = UpdateLosses()
        self.record: RunRecord | None = None
        self.identity: RunIdentity | None = None
        self.run_dir: str | None = None
        self.warmup: int | None = None
        self.scales_rate = False
        self.learning_rate = "the learning rate has no warm-up after them"
        self._restored: TopologyState | None = None
        self._earlier_steps = 0
        self._printed_layers = False
        self._waiting: dict[str, Any] = {}  # figures that are not logged yet

    def state(self, step: int) -> TopologyState:
        """The state that a checkpoint after `step` needs beyond weights and optimizer. Collective."""
        run = self.identity.id if self.identity else None
        return replace(self.evolver.state(step), loss_before_update=self.losses.before, run=run)

    def restore(self, state: TopologyState | None, *, max_steps: int = 0) -> None:
        """Make the next training continue from a checkpoint, and set its masks now. None makes it start anew.

        Args:
            max_steps: the length of the run that wrote the checkpoint; 0 if it is not known.
        """
        self._restored, self._earlier_steps = state, max_steps
        self.evolver.restore(state)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        evolver, step = self.evolver, state.global_step
        measured: dict[str, Any] = {"say": self.say}
        if evolver.config.compute == "auto":
            tokens = args.per_device_train_batch_size * sequence_length(kwargs.get("train_dataloader"))
            measured["tokens"] = tokens
            measured["dtype"] = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        evolver.begin(state.max_steps, optimizer, step, **measured)
        self.losses = UpdateLosses(self._restored.loss_before_update if self._restored else None)
        self._waiting = {}
        self.record = None
        if not state.is_world_process_zero:
            return
        if not self._printed_layers:
            self._printed_layers = True
            for line in layer_lines(evolver.sparse):
                self.say(line)
        if evolver.config.evolves:
            self._print_plan(step, learning_rates(optimizer, lr_scheduler))
        if args.output_dir:
            assert evolver.plan is not None
            shapes = {name: layer.storage.shape for name, layer in evolver.sparse.layers.items()}
            run = self.identity.id if self.identity else None
            self.record = RunRecord(self.run_dir or args.output_dir, shapes, evolver.plan, run)
            self.record.begin(step, evolver.sparse.topologies())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        sizes = self.sizes(state.global_step)
        self.restore(None)
        self.evolver.close()
        if self.record is not None:
            self.record.end(state.global_step, sizes)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.evolver.plan is not None, "on_train_begin makes the plan"
        self.losses.begin(state.global_step, self.evolver.plan)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        evolver, step = self.evolver, state.global_step
        assert evolver.plan is not None
        figures = self.losses.end(step, evolver.plan)
        try:
            figures |= (updated := evolver.step(step))
        except NotFinite as error:
            raise diverged(step, error.names, args.output_dir, "the topology is not updated by them") from None
        if updated and self.record is not None and (evolver.plan.is_told(step) or step in self.record.steps):
            softness = evolver.softness if evolver.config.adapts_softness else {}
            seconds = updated["topology_seconds"]
            self.record.update(step, evolver.last_update, evolver.sparse.topologies(), seconds, softness)
        if self.log is not None:
            if figures:
                # Trainer.log marks the step as logged, and its loss would be skipped
                should_log = control.should_log
                self.log(figures)
                control.should_log = should_log
            return
        self._waiting |= figures
        # the losses around an update wait for the next log, or for the next checkpoint or the end if that comes first
        last = control.should_save or step >= state.max_steps
        every_step = evolver.config.trains_missing and evolver.plan.interval == 1  # too often for lines of their own
        control.should_log |= bool(self._waiting) and (last or (evolver.plan.is_update(step) and not every_step))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_log |= bool(self._waiting) and control.should_save

    def sizes(self, steps: int) -> dict[str, float]:
        """How large the model is after `steps` steps, and on the mean over them: its links, and its parameters, which
        are these and all that is dense."""
        sparse = self.evolver.sparse
        links, dense = sparse.links(), sparse.dense_parameters()
        average = round(average_links(self.evolver.history, links, steps), 2)
        return {
            "links": links,
            "average_links": average,
            "parameters": links + dense,
            "average_parameters": average + dense,
        }

    def take_figures(self) -> dict[str, Any]:
        """Return the figures to log with the loss of this step, and forget them."""
        figures, self._waiting = self._waiting, {}
        return figures

    def _print_plan(self, step: int, rates: tuple[float, float] | None) -> None:
        evolver = self.evolver
        plan = evolver.plan
        assert plan is not None
        self.say(plan_line(plan, self.learning_rate))
        earlier = None
        if self._restored is not None and self._earlier_steps not in (0, plan.max_steps):
            with suppress(ValueError):  # an earlier version may have allowed that length
                earlier = plan.config.plan(self._earlier_steps)
        layers = evolver.sparse.layers
        trained = evolver.trained or list(layers)
        possible = sum(prod(layers[name].storage.shape) for name in trained)
        sparsity = 1 - sum(layers[name].links for name in trained) / possible
        reached = evolver.reached
        if reached is None and earlier is not None:
            reached = earlier.sparsity(step // plan.interval * plan.interval)
        if reached is None or not evolver.trained:
            reached = plan.config.sparsity
        for line in changed_lines(plan, step, sparsity, reached, earlier, rates):
            _log.warning(line)

"""The learning rate: when the Trainer's schedule ends, a factor by density, and warm-ups after topology updates."""

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from hf_chts.config import SparsityConfig
from hf_chts.evolution.update_warmup import (
    PAPER_WARMUP,
    add_density_factor,
    add_end,
    add_update_warmup,
    warmup_steps,
)
from hf_chts.sparse_model import SparsityHandle
from hf_chts.training.any_trainer import AnyTrainer
from hf_chts.training.callback import TopologyCallback


def asked_warmup(args: Any, config: SparsityConfig, max_steps: int) -> int:
    """Optimizer steps of warm-up after each update. Raises ValueError if they do not fit `update_interval`.

    Args:
        max_steps: 0 or less if it is not known yet.
    """
    asked = getattr(args, "update_warmup_steps", 0)
    if not config.evolves:
        return 0
    by_link = config.regrown_warmup > 0
    if config.update_interval < 1 and max_steps <= 0:
        return (0 if by_link else PAPER_WARMUP) if asked is None else asked
    return warmup_steps(asked, config.interval(max_steps), by_link=by_link)


class WarmsUpAfterUpdates(AnyTrainer):
    """The part of SparseTrainer that adds warm-ups after updates to the learning-rate schedule."""

    sparse: SparsityHandle
    topology_callback: TopologyCallback | None

    @property
    def update_warmup_steps(self) -> int:
        """Optimizer steps over which the learning rate climbs back after each topology update; 0: none."""
        if self.topology_callback is not None and self.topology_callback.warmup is not None:
            return self.topology_callback.warmup
        return asked_warmup(self.args, self.sparse.config, self.args.max_steps)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        fresh = self.lr_scheduler is None
        until = getattr(self.args, "lr_schedule_until", 1.0)
        end = max(1, round(until * num_training_steps))
        scheduler = super().create_scheduler(end, optimizer)
        if fresh and end < num_training_steps:
            if not isinstance(scheduler, LambdaLR):
                raise ValueError(
                    f"lr_schedule_until is {until}, but the schedule {self.args.lr_scheduler_type!r} is not a function "
                    "of the step: leave it out, or choose another lr_scheduler_type"
                )
            add_end(scheduler, end)
        if self.topology_callback is not None and self.sparse.config.rate_by_density != "none":
            self._scale_by_density(scheduler, fresh, num_training_steps)
        if self.topology_callback is not None and self.sparse.config.evolves:
            self._warm_up_after_updates(scheduler, fresh, num_training_steps)
        return scheduler

    def _scale_by_density(self, scheduler: Any, fresh: bool, num_training_steps: int) -> None:
        topology = self.topology_callback
        assert topology is not None
        if not fresh and topology.scales_rate:  # by a copy of this trainer, under DeepSpeed
            return
        if not fresh or not isinstance(scheduler, LambdaLR):
            obstacle = (
                f"the schedule {self.args.lr_scheduler_type!r} is not a function of the step"
                if fresh
                else "the learning-rate schedule is not the Trainer's own"
            )
            raise ValueError(
                f"rate_by_density is {self.sparse.config.rate_by_density!r}, but {obstacle}: set rate_by_density to "
                "none and scale the rate yourself (evolver.scale_rate), or choose another lr_scheduler_type"
            )
        topology.scales_rate = True
        add_density_factor(scheduler, topology.evolver.plan_from(self.state.global_step, num_training_steps))

    def _warm_up_after_updates(self, scheduler: Any, fresh: bool, num_training_steps: int) -> None:
        topology, interval = self.topology_callback, self.sparse.config.interval(num_training_steps)
        assert topology is not None
        if not fresh and topology.warmup is not None:  # made by a copy of this trainer, under DeepSpeed
            return
        asked = getattr(self.args, "update_warmup_steps", 0)
        steps = asked_warmup(self.args, self.sparse.config, num_training_steps)
        obstacle = None
        if not fresh:
            obstacle = "the learning-rate schedule is not the Trainer's own"
        elif not isinstance(scheduler, LambdaLR):
            obstacle = f"the schedule {self.args.lr_scheduler_type!r} is not a function of the step"
        if obstacle and asked:
            raise ValueError(
                f"update_warmup_steps is {asked}, but {obstacle}: set update_warmup_steps to 0, or choose another "
                "lr_scheduler_type"
            )
        why = ""
        if not hasattr(self.args, "update_warmup_steps"):
            why = " (use SparseTrainingArguments to have one)"
        elif obstacle and asked is None:
            steps, why = 0, f": {obstacle}"
        elif asked is None and self.sparse.config.regrown_warmup:
            own_steps = self.sparse.config.link_warmup(num_training_steps)
            why = f", but each regrown link has its own, over {own_steps} steps"
        elif asked is None and steps < PAPER_WARMUP and interval > 1:
            why = f", a fifth of update_interval ({interval}), where the paper's {PAPER_WARMUP} would be too many"
        plan = topology.evolver.plan_from(self.state.global_step, num_training_steps)
        own = self.args.get_warmup_steps(num_training_steps) if fresh else 0
        if own >= plan.last_update:
            why += f"; its own warm-up, {own} steps, ends after the last of them"
        topology.warmup = steps
        topology.learning_rate = f"the learning rate has no warm-up after them{why}"
        if steps:
            add_update_warmup(scheduler, plan, steps)
            topology.learning_rate = f"the learning rate climbs back over {steps} steps after each{why}"

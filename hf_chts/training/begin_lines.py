"""What is printed when training begins: the topology updates to come, and what is different from the resumed run."""

import math
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from hf_chts.schedule_plan import SchedulePlan


def plan_line(plan: SchedulePlan, learning_rate: str) -> str:
    """The topology updates of a run, and what the learning rate does after each of them."""
    interval = plan.config.update_interval
    updates = [step for step in range(interval, plan.window_end + 1, interval) if plan.is_update(step)]
    if not updates:
        return "topology: no update in this run can change it"
    when = f"after step {updates[0]}" if len(updates) == 1 else f"every {interval} steps, {updates[0]} to {updates[-1]}"
    return f"topology: {len(updates)} update{'s' if len(updates) > 1 else ''}, {when}; {learning_rate}"


def changed_lines(
    plan: SchedulePlan,
    step: int,
    sparsity: float,
    reached: float,
    earlier: SchedulePlan | None,
    rates: tuple[float, float] | None,
) -> list[str]:
    """Warnings about what a reader of the config, or of the run that wrote the checkpoint, would not expect.

    Args:
        plan: the schedules from `step` on.
        step: of the checkpoint; 0 at the start of a run.
        sparsity: of the layers that train.
        reached: the sparsity of the run at `step`: that of its layers, where none of them has its own.
        earlier: the schedules of the run that wrote the checkpoint, if that run had another length.
        rates: the learning rate in the checkpoint, and that of the schedule now; None where they are not known.
    """
    lines = []
    length = plan.max_steps
    if earlier is not None:
        line = (
            f"The run goes on to step {length}, that of the checkpoint would have gone to {earlier.max_steps}: the "
            f"last topology update is at step {plan.last_update}, where it was at {earlier.last_update}"
        )
        if rates is None:
            line += "; the learning rate follows the schedule of the new length"
        elif rates[0] != rates[1]:
            line += f"; the learning rate at step {step} was {rates[0]:.3g}, the new schedule has {rates[1]:.3g} there"
        lines.append(line)
    if plan.decay_end and plan.last_update <= step and abs(reached - plan.config.sparsity) > 1e-9:
        # at the next update, if the schedule ended there
        interval, until = plan.config.update_interval, plan.config.sparsity_schedule_until
        enough = math.ceil((step // interval + 1) * interval / until - 1e-9)
        lines.append(
            f"No topology update is left after step {step} in a run of {length} steps: sparsity ends at {sparsity:.2%} "
            f"and does not reach the {plan.config.sparsity:.2%} of the config, for which the run must have at least "
            f"{enough} steps"
        )
    elif plan.floor:
        interval = plan.config.update_interval
        behind = (s for s in range(step // interval * interval, length + 1, interval) if _caught_up(plan, s))
        lines.append(
            f"Sparsity stays at {plan.floor:.2%}, where the schedule of {length} steps has "
            f"{plan.scheduled_sparsity(step // interval * interval):.2%} after step {step}, until that has caught up "
            f"at step {next(behind)}"
        )
    elif earlier is not None and plan.last_update > step:
        update = next(s for s in range(step + 1, length + 1) if plan.is_update(s))
        if plan.sparsity(update) > earlier.sparsity(update) + 1e-9:
            lines.append(
                f"The schedule of {length} steps is ahead of the model: its sparsity goes from {sparsity:.2%} to "
                f"{plan.sparsity(update):.2%} with the update at step {update}"
            )
    return lines


def _caught_up(plan: SchedulePlan, step: int) -> bool:
    return plan.scheduled_sparsity(step) >= plan.floor - 1e-9


def learning_rates(optimizer: Any, scheduler: Any) -> tuple[float, float] | None:
    """(the optimizer's, the schedule's at the same step); None where the schedule is not a LambdaLR."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # Accelerate's wrapper
    if not isinstance(scheduler, LambdaLR):
        return None
    return optimizer.param_groups[0]["lr"], float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](scheduler.last_epoch))

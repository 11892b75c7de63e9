"""A learning-rate warm-up after each topology update, on top of any of the Trainer's own schedules."""

from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR

from hf_chts.schedule_plan import SchedulePlan


def update_warmup(step: int, plan: SchedulePlan, warmup_steps: int) -> float:
    """The factor on the learning rate of optimizer step `step`, counted from 0: 1/n, 2/n, … n/n in the n steps that
    follow an update, 1 elsewhere (arXiv 2501.19107, Table 6: n = 20).

    Regrown links start at 0 among trained ones, and with fresh moments: small steps at first.
    """
    # the step with index u is the first after an update at u finished steps
    updates = plan.number_of_updates(step)
    if not updates or not warmup_steps:
        return 1.0
    since = step - updates * plan.config.update_interval
    return min(1.0, (since + 1) / warmup_steps)


def add_update_warmup(scheduler: LambdaLR, plan: SchedulePlan, warmup_steps: int) -> None:
    """Multiply the warm-up into a scheduler whose rate is a function of the step, in place.

    The factor is a function of the step alone, so a resumed scheduler is right without any state of its own.
    """

    def with_warmup(rate: Callable[[int], float]) -> Callable[[int], float]:
        # a plain function: LambdaLR.state_dict stores the attributes of callable objects
        return lambda step: rate(step) * update_warmup(step, plan, warmup_steps)

    scheduler.lr_lambdas = [with_warmup(rate) for rate in scheduler.lr_lambdas]

"""A learning-rate warm-up after each topology update, on top of any of the Trainer's own schedules."""

from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR

from hf_chts.schedule_plan import SchedulePlan

# arXiv 2501.19107, Table 6, where updates are 100 steps apart
PAPER_WARMUP = 20


def warmup_steps(asked: int | None, update_interval: int) -> int:
    """The number of optimizer steps of the warm-up after an update.

    Args:
        asked: None takes the paper's 20, or a fifth of the interval if that is less, as it is in the paper.

    Raises:
        ValueError: `asked` is so large that the rate would hardly ever be the full one.
    """
    if asked is None:
        return min(PAPER_WARMUP, update_interval // 5)
    if asked > 1 and asked >= update_interval:
        raise ValueError(
            f"update_warmup_steps is {asked}, but the topology is updated every {update_interval} steps "
            "(update_interval), so that the learning rate would hardly ever be the full one: lower update_warmup_steps "
            f"to some {update_interval // 5}, or leave it out"
        )
    return asked


def update_warmup(step: int, plan: SchedulePlan, warmup_steps: int) -> float:
    """The factor on the learning rate of optimizer step `step`, counted from 0: 1/n, 2/n, … n/n in the n steps that
    follow an update, 1 elsewhere.

    Regrown links start at 0 among trained ones, and with fresh moments: small steps at first.
    """
    # the step with index u is the first after an update at u finished steps
    update = plan.latest_update(step)
    if not update or not warmup_steps:
        return 1.0
    return min(1.0, (step - update + 1) / warmup_steps)


def add_update_warmup(scheduler: LambdaLR, plan: SchedulePlan, warmup_steps: int) -> None:
    """Add the warm-up to a scheduler whose rate is a function of the step, in place.

    The factor is a function of the step alone, so a resumed scheduler is right without any state of its own.
    """

    def with_warmup(rate: Callable[[int], float]) -> Callable[[int], float]:
        # a plain function: LambdaLR.state_dict stores the attributes of callable objects
        return lambda step: rate(step) * update_warmup(step, plan, warmup_steps)

    scheduler.lr_lambdas = [with_warmup(rate) for rate in scheduler.lr_lambdas]


def rate_by_links(step: int, plan: SchedulePlan) -> float:
    """The factor on the learning rate of optimizer step `step`, counted from 0: 1/√density (arXiv 2511.13653).

    The fewer links a matrix has, the larger the steps that they need and bear.
    """
    return float((1 - plan.sparsity(plan.latest_update(step))) ** -0.5)


def add_rate_by_links(scheduler: LambdaLR, plan: SchedulePlan) -> None:
    """Add this factor to a scheduler whose rate is a function of the step, in place."""

    def by_links(rate: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: rate(step) * rate_by_links(step, plan)

    scheduler.lr_lambdas = [by_links(rate) for rate in scheduler.lr_lambdas]


def add_end(scheduler: LambdaLR, end: int) -> None:
    """Have a scheduler whose rate is a function of the step stay, from step `end` on, at its rate there. In place."""

    def until(rate: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: rate(min(step, end))

    scheduler.lr_lambdas = [until(rate) for rate in scheduler.lr_lambdas]

"""Factors on any of the Trainer's own learning-rate schedules: a warm-up after each update, and one by density."""

from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR

from hf_chts.schedule_plan import SchedulePlan

# arXiv 2501.19107, Table 6, where updates are 100 steps apart
PAPER_WARMUP = 20


def warmup_steps(asked: int | None, update_interval: int, *, by_link: bool = False) -> int:
    """The number of optimizer steps of the warm-up after an update.

    Args:
        asked: None takes the paper's 20, or a fifth of the interval if that is less, as it is in the paper; 0 where
            regrown links have a warm-up of their own.
        by_link: whether they have.

    Raises:
        ValueError: `asked` is so large that the rate would hardly ever be the full one.
    """
    if asked is None and by_link:
        return 0
    if asked is None:
        return min(PAPER_WARMUP, update_interval // 5)
    if asked > 1 and asked >= update_interval:
        raise ValueError(
            f"update_warmup_steps is {asked}, but the topology is updated every {update_interval} steps "
            "(update_interval), so that the learning rate would hardly ever be the full one: lower update_warmup_steps "
            f"to {max(1, update_interval // 5)}, or leave it out"
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


def density_factor(step: int, plan: SchedulePlan) -> float:
    """1/√d of the optimizer step `step`, counted from 0, with d the density of the sparse layers then.

    SMET (arXiv 2606.00888) scales the rate of dense training by it: α_s = α_0/√d.
    """
    return (1 - plan.sparsity_after(step)) ** -0.5


def add_density_factor(scheduler: LambdaLR, plan: SchedulePlan) -> None:
    """Multiply the rates of a scheduler, a function of the step, by `density_factor`. In place, without state.

    The rate that the optimizer has now, for the next step, too.
    """

    def scaled(rate: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: rate(step) * density_factor(step, plan)

    scheduler.lr_lambdas = [scaled(rate) for rate in scheduler.lr_lambdas]
    rates = scheduler.get_last_lr()
    for number, group in enumerate(scheduler.optimizer.param_groups):
        group["lr"] = group["lr"] * density_factor(scheduler.last_epoch, plan)
        rates[number] = group["lr"]
    scheduler._last_lr = rates


def add_end(scheduler: LambdaLR, end: int) -> None:
    """Have a scheduler whose rate is a function of the step stay, from step `end` on, at its rate there. In place."""

    def until(rate: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: rate(min(step, end))

    scheduler.lr_lambdas = [until(rate) for rate in scheduler.lr_lambdas]

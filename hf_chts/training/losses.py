"""The training loss just before and just after each topology update."""

import torch
from torch import Tensor

from hf_chts.schedule_plan import SchedulePlan
from hf_chts.sharding.ranks import mean_over_ranks
from hf_chts.training.unlabelled import excuse_unlabelled


class UpdateLosses:
    """The loss of the last step before an update and of the first step after it.

    They come from different batches, so one pair says little; the mean over many updates tells what updates cost.

    Attributes:
        before: the loss before the last update, until the next step has ended.
    """

    def __init__(self, before: float | None = None) -> None:
        self._adding = False
        self._sum: Tensor | None = None  # (2,): of the losses, and of the micro-batches that have labels
        self.before = before

    def begin(self, finished: int, plan: SchedulePlan) -> None:
        """Called when a step begins, after `finished` steps."""
        every_step = plan.config.trains_missing and plan.interval == 1  # the loss changes with each of them anyway
        after = self.before is not None and plan.is_update(finished)
        self._adding = not every_step and (plan.is_update(finished + 1) or after)
        self._sum = None

    def add(self, loss: Tensor, unlabelled: Tensor | None = None) -> None:
        """Add a micro-batch's share of the step's loss, and whether it has no labels, if that is known."""
        if self._adding:
            loss = excuse_unlabelled(loss, unlabelled).to(torch.float32)
            labelled = torch.ones_like(loss) if unlabelled is None else (~unlabelled).to(loss)
            both = torch.stack([loss, labelled])
            self._sum = both if self._sum is None else self._sum + both

    def end(self, finished: int, plan: SchedulePlan) -> dict[str, float]:
        """Called when step number `finished` ends. Returns the figures to log if it is the first after an update."""
        if not self._adding or self._sum is None:
            return {}
        loss, labelled = mean_over_ranks(self._sum.clone()).tolist()
        figures = {}
        if plan.is_update(finished - 1) and self.before is not None and labelled:
            figures = {"loss_before_update": self.before, "loss_after_update": loss}
        # without labels the loss is 0 and means nothing
        self.before = loss if plan.is_update(finished) and labelled else None
        return figures

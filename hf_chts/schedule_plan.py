"""A run's schedules in steps: when it updates its topology, and with which sparsity, drop fraction and temperature."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from hf_chts.topology import schedules
from hf_chts.topology.parts import SPARSITY_SCHEDULES
from hf_chts.topology.softness import temperature

# Updates whose figures are kept, of a run that has one after each step
_TOLD = 400


@dataclass(frozen=True)
class SchedulePlan:
    """The schedules of one run. Steps count finished optimizer steps: an update at step 100 follows the 100th.

    Attributes:
        config: the SparsityConfig.
        window_end: the last multiple of the interval in the window of updates; 0 if nothing evolves.
        decay_end: the update that reaches the final sparsity; 0 if sparsity is constant.
        decay_start: the last step with the initial sparsity.
        floor: the lowest sparsity; that of the model, if it is ahead of the schedule.
        idle: steps in the window without an update, because it could change nothing.
    """

    config: Any
    max_steps: int
    window_end: int
    decay_end: int
    floor: float = 0.0
    idle: frozenset[int] = field(default=frozenset(), repr=False)
    decay_start: int = 0

    @classmethod
    def of(
        cls,
        config: Any,
        max_steps: int,
        *,
        floor: float = 0.0,
        links: Callable[[float], Sequence[int]] | None = None,
    ) -> "SchedulePlan":
        """The plan of a run of `max_steps` optimizer steps.

        Args:
            floor: see above.
            links: gives the links, at a sparsity, of each layer or block of rows that evolves on its own; with it an
                update also counts as idle if ζ of the largest one rounds to 0 links.

        Raises:
            ValueError: the config's intervals do not fit into `max_steps`.
        """
        if not config.evolves:
            return cls(config, max_steps, 0, 0)
        interval = config.interval(max_steps)
        window_end = _whole_intervals(config.update_until * max_steps, interval)
        decay_start, decay_end = 0, 0
        if window_end and config.changes_sparsity:
            # sparsity changes only at updates, so the schedule must end at one
            decay_end = _whole_intervals(config.sparsity_schedule_until * max_steps, interval)
            if not decay_end:
                raise ValueError(
                    f"the sparsity schedule ends after {config.sparsity_schedule_until * max_steps:g} of {max_steps} "
                    f"steps, before the first topology update at step {interval}: lower update_interval, train longer, "
                    "or raise sparsity_schedule_until"
                )
            decay_start = _whole_intervals(config.sparsity_schedule_from * max_steps, interval)
            if decay_start >= decay_end:
                raise ValueError(
                    f"the sparsity schedule goes from step {config.sparsity_schedule_from * max_steps:g} to "
                    f"{config.sparsity_schedule_until * max_steps:g}, with no topology update between them "
                    f"(every {interval} steps): lower update_interval or sparsity_schedule_from, or train longer"
                )
        plan = cls(config, max_steps, window_end, decay_end, decay_start=decay_start)
        # a drop fraction of 0 is allowed on purpose; that a layer is too small for one is not an error either
        if not window_end or (config.drop_fraction and window_end == interval and plan._idle_steps(None)):
            end = config.update_until * max_steps
            raise ValueError(
                f"update_interval is {interval} steps, but the topology is updated only in the first "
                f"{config.update_until:g} of {max_steps} steps, so it never would be: lower update_interval to "
                f"at most {math.ceil(end - 1e-9) - 1}, or train longer"
            )
        plan = replace(plan, floor=floor)
        return replace(plan, idle=plan._idle_steps(links))

    def _idle_steps(self, links: Callable[[float], Sequence[int]] | None) -> frozenset[int]:
        config, interval = self.config, self.interval
        # these move links between layers, or away from dead neurons, even if ζ is 0
        moves = config.percolation or config.allocation == "global"
        most = lru_cache(lambda sparsity: max(links(sparsity)) if links else 10**9)

        def idle(step: int) -> bool:
            sparsity = self.sparsity(step)
            if sparsity != self.sparsity(step - interval):
                return False
            if config.selects:  # ζ does not matter: weights grow past each other, where there are any that left
                return sparsity == 0
            # links regrown after the last step are never trained
            if step == self.max_steps or sparsity == 0:
                return True
            return not moves and round(self.drop_fraction(step) * most(sparsity)) == 0

        return frozenset(step for step in range(interval, self.window_end + 1, interval) if idle(step))

    @property
    def interval(self) -> int:
        """Steps between topology updates."""
        return int(self.config.interval(self.max_steps))

    @property
    def last_update(self) -> int:
        """The last step with an update; 0 if there is none."""
        return self.latest_update(self.max_steps)

    def is_update(self, step: int) -> bool:
        return 0 < step <= self.window_end and step % self.interval == 0 and step not in self.idle

    def is_told(self, step: int) -> bool:
        """Whether the figures of an update at `step` are kept: those of each update, but where one follows every step
        of a long run, those of the last one and of some hundreds before it."""
        if not self.is_update(step):
            return False
        every = -(-self.number_of_updates(self.last_update) // _TOLD) if self.config.trains_missing else 1
        return step == self.last_update or self.number_of_updates(step) % every == 0

    def latest_update(self, step: int) -> int:
        """The step of the last update when `step` is finished; 0 if there was none."""
        step = self.number_of_updates(step) * self.interval
        while step in self.idle:
            step -= self.interval
        return step

    def number_of_updates(self, step: int) -> int:
        """The number of updates when `step` is finished, idle ones included."""
        return min(step, self.window_end) // self.interval

    def sparsity(self, step: int) -> float:
        return max(self.scheduled_sparsity(step), self.floor)

    def scheduled_sparsity(self, step: int) -> float:
        """The sparsity at `step` without the floor."""
        config = self.config
        if not self.decay_end:
            return config.sparsity
        schedule = SPARSITY_SCHEDULES[config.sparsity_schedule]
        ends = {"initial": config.initial_sparsity, "final": config.sparsity}
        return float(schedule(config, step=step, start=self.decay_start, end=self.decay_end, **ends))

    def sparsity_after(self, step: int) -> float:
        """The sparsity that the optimizer step after `step` finished ones is taken with."""
        return self.sparsity(self.number_of_updates(step) * self.interval)

    def average(self, links: Callable[[float], float]) -> float:
        """The mean over the run's optimizer steps of a number of links, given as a function of the sparsity."""
        known = lru_cache(links)
        return sum(known(self.sparsity_after(step)) for step in range(self.max_steps)) / self.max_steps

    def drop_fraction(self, step: int) -> float:
        """ζ at `step`; unless it is constant, it reaches 0 at `update_until` of the run."""
        config = self.config
        schedule = schedules.DROP_SCHEDULES[config.drop_schedule]
        return schedule(step, config.update_until * self.max_steps, config.drop_fraction)

    def temperature(self, step: int) -> float:
        """T = δ/(1−δ) of a soft removal; δ goes linearly from the first update to the last (paper App. H)."""
        config, first = self.config, self.interval
        if self.window_end > first:
            softness = schedules.linear(step, first, self.window_end, config.softness_start, config.softness_end)
        else:
            softness = config.softness_start
        return temperature(softness)


def _whole_intervals(steps: float, interval: int) -> int:
    # 0.75 * 400 must give 300, in spite of rounding
    return math.floor(steps / interval + 1e-9) * interval

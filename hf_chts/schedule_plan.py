"""When a run updates its topology, and what holds at each update: the config's fractions turned into steps."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_chts.topology import schedules
from hf_chts.topology.softness import temperature

if TYPE_CHECKING:
    from hf_chts.config import SparsityConfig


@dataclass(frozen=True)
class SchedulePlan:
    """The schedules of one run. Steps count finished optimizer steps: an update at step 100 follows the 100th."""

    config: "SparsityConfig"
    max_steps: int
    last_update: int  # the last step with an update; 0 if there is none
    decay_end: int  # the update at which the final sparsity is reached; 0 if sparsity is constant

    @classmethod
    def of(cls, config: "SparsityConfig", max_steps: int) -> "SchedulePlan":
        """Raises ValueError where the config's intervals do not fit into `max_steps`."""
        if not config.evolves:
            return cls(config, max_steps, 0, 0)
        interval = config.update_interval
        last_update = _whole_intervals(config.update_until * max_steps, interval)
        if not last_update:
            raise ValueError(
                f"update_interval is {interval} steps, but the topology is updated only in the first "
                f"{config.update_until:g} of {max_steps} steps, so it never would be: lower update_interval to "
                f"at most {int(config.update_until * max_steps)}, or train longer"
            )
        decay_end = 0
        if config.sparsity_schedule != "constant":
            # A decay ends *at* an update, since between updates nothing can reach its target
            decay_end = _whole_intervals(config.sparsity_schedule_until * max_steps, interval)
            if not decay_end:
                raise ValueError(
                    f"the sparsity schedule ends after {config.sparsity_schedule_until * max_steps:g} of {max_steps} "
                    f"steps, before the first topology update at step {interval}: lower update_interval, train longer, "
                    "or raise sparsity_schedule_until"
                )
        return cls(config, max_steps, last_update, decay_end)

    def is_update(self, step: int) -> bool:
        return 0 < step <= self.last_update and step % self.config.update_interval == 0

    def number_of_updates(self, step: int) -> int:
        """How many updates have taken place once `step` is finished."""
        return min(step, self.last_update) // self.config.update_interval

    def sparsity(self, step: int) -> float:
        config = self.config
        if not self.decay_end:
            return config.sparsity
        if config.sparsity_schedule == "elastic":
            return schedules.elastic(step, self.decay_end, config.sparsity)
        window = (step, 0, self.decay_end, config.initial_sparsity, config.sparsity)
        if config.sparsity_schedule == "sigmoid":
            return schedules.sigmoid(*window, k=config.sigmoid_k)
        return {"linear": schedules.linear, "cubic": schedules.cubic}[config.sparsity_schedule](*window)

    def drop_fraction(self, step: int) -> float:
        """ζ at `step`; it reaches 0 where updates end (`update_until` of the run)."""
        config = self.config
        end = config.update_until * self.max_steps
        if config.drop_schedule == "constant":
            return config.drop_fraction
        if config.drop_schedule == "linear":
            return schedules.linear(step, 0, end, config.drop_fraction, 0.0)
        return schedules.cosine_anneal(step, end, config.drop_fraction)

    def temperature(self, step: int) -> float:
        """T = δ/(1−δ) of a soft removal; δ goes linearly from the first update to the last (paper App. H)."""
        config, first = self.config, self.config.update_interval
        if self.last_update > first:
            softness = schedules.linear(step, first, self.last_update, config.softness_start, config.softness_end)
        else:
            softness = config.softness_start
        return temperature(softness)


def _whole_intervals(steps: float, interval: int) -> int:
    # 0.75 * 400 must count as 300, not as a hair less
    return math.floor(steps / interval + 1e-9) * interval

"""Adam's bias correction, restarted for each regrown link, and a warm-up of its own.

A regrown link starts with moments of 0, late in a run whose bias correction is long over. Its second moment then lags
behind its first: with β = (0.9, 0.999) the steps of its first hundred updates are up to some 6 times the learning rate
(SMET, arXiv 2606.00888, traces loss spikes to this). With the correction counted from the step at which the link was
regrown, they are as large as the first steps of the run.

torch's optimizer counts one step for a whole tensor, so it is left to take its step, and the difference is added to
the regrown links right after:

    w += lr · (m̂_t / (√v̂_t + ε) − m̂_a / (√v̂_a + ε)),   m̂_n = m / (1 − β1^n),   v̂_n = v / (1 − β2^n)

with t the steps of the tensor and a those since the link was regrown.

With a warm-up over W steps, the first of the two fractions in the brackets stays what the optimizer has taken, and the
second one is multiplied by min(1, a/W), so that the link's steps grow to their full size (SMET again). Without a
restart t takes the place of a in m̂_a and v̂_a. Decoupled weight decay keeps the rate of the tensor.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_chts.layers.sparse_layer import SparseLayer
from hf_chts.sharding.interface import Engine
from hf_chts.topology.bits import link_positions

# if β2^a is below this, fp32 rounds the correction away
_NEGLIGIBLE = 2.0**-24


class RegrownAdam:
    """Corrects the steps that torch's Adam or AdamW takes on regrown links.

    Args:
        layers: the sparse layers by name.
        engine: what holds their weights and moments.
        update_interval: optimizer steps between topology updates.
        restart: whether the bias correction begins anew with each regrown link.
        warmup: steps over which the steps of a regrown link grow to their full size; 0: none.

    Attributes:
        born: int16 by name, for this rank's extent of the weight (`Engine.zeros`): the number of the update, from 1,
            that regrew a link; 0 for links that were there from the start, and off the mask.
    """

    def __init__(
        self,
        layers: Mapping[str, SparseLayer],
        engine: Engine,
        update_interval: int,
        *,
        restart: bool = True,
        warmup: int = 0,
    ) -> None:
        self.layers = layers
        self.engine = engine
        self.update_interval = update_interval
        self.restart, self.warmup = restart, warmup
        self.born = {name: torch.zeros_like(engine.zeros(x), dtype=torch.int16) for name, x in layers.items()}
        # (interval, positions, births) of the links young enough to correct, for an interval between updates
        self._young: dict[str, tuple[int, Tensor, Tensor]] = {}

    @staticmethod
    def check(optimizer: Any) -> None:
        """Raises ValueError, naming the optimizer, if its steps cannot be corrected from outside."""
        inner = optimizer
        while type(inner).__module__.startswith(("accelerate.", "deepspeed.runtime.")) and hasattr(inner, "optimizer"):
            inner = inner.optimizer
        kind = f"{type(inner).__module__}.{type(inner).__qualname__}"
        if type(inner) not in (torch.optim.Adam, torch.optim.AdamW):
            raise ValueError(
                f"regrown_adam: per_weight_steps and regrown_warmup know torch.optim.Adam and AdamW, and the optimizer "
                f"is {kind}: set regrown_adam to global_steps and regrown_warmup to 0, or use torch.optim.AdamW "
                "(optim: adamw_torch; under DeepSpeed without an optimizer in its own config)"
            )
        if any(group["amsgrad"] or group["maximize"] for group in inner.param_groups):
            raise ValueError(
                "regrown_adam: per_weight_steps and regrown_warmup do not know amsgrad or maximize: turn those off, or "
                "set regrown_adam to global_steps and regrown_warmup to 0"
            )

    def check_updates(self, number: int) -> None:
        """Raises ValueError if a run has more updates than int16 can count."""
        most = torch.iinfo(torch.int16).max
        if number > most:
            raise ValueError(
                f"regrown_adam: per_weight_steps and regrown_warmup count to {most} topology updates, and the run has "
                f"{number}: raise update_interval, or set regrown_adam to global_steps and regrown_warmup to 0"
            )

    def changed(self, name: str) -> None:
        """Call after the layer's links and `born` have changed."""
        self._young.pop(name, None)

    def keep(self, name: str, elements: Tensor) -> None:
        """Call after the layer's parameter was reduced to these elements, int64 (n,)."""
        self.born[name] = self.born[name][elements]
        self._young.pop(name, None)

    def restore(self, name: str, born: Tensor) -> None:
        """Restore a layer's births from a checkpoint: whole, in the parameter's shape."""
        start, stop = self.engine.extent(self.layers[name])
        self.born[name].copy_(born.reshape(-1)[start:stop].view_as(self.born[name]))
        self._young.pop(name, None)

    @torch.no_grad()
    def correct(self, step: int) -> None:
        """Correct the step that the optimizer has just taken; with it, `step` steps are finished."""
        for name, layer in self.layers.items():
            stepped = self.engine.stepped(layer)
            if stepped is None:
                continue
            held, group = stepped.held, stepped.group
            positions, updates = self._young_links(name, step, group["betas"][1])
            if not len(positions):
                continue
            ages = step - updates.to(torch.float64) * self.update_interval
            # in float64: the difference of two nearly equal steps is added to a weight that has taken one of them
            first, second = (held[key].view(-1)[positions].double() for key in ("exp_avg", "exp_avg_sq"))
            steps = torch.as_tensor(float(stepped.step), dtype=torch.float64)
            taken = _step(first, second, group, steps)
            own = _step(first, second, group, ages) if self.restart else taken
            if self.warmup:
                own = own * (ages / self.warmup).clamp_(max=1)
            change = taken - own
            held["weight"].view(-1).index_add_(0, positions, change.to(held["weight"].dtype))

    def _young_links(self, name: str, step: int, beta2: float) -> tuple[Tensor, Tensor]:
        # by the interval, not the step, so that a resumed run leaves out the same links
        interval = (step - 1) // self.update_interval
        if name not in self._young or self._young[name][0] != interval:
            born = self.born[name].view(-1)
            positions = link_positions(self.born[name] > 0)
            ages = (interval - born[positions].to(torch.float64)) * self.update_interval
            restarting = (beta2**ages > _NEGLIGIBLE) & self.restart
            positions = positions[restarting | (ages < self.warmup)]
            self._young[name] = (interval, positions, born[positions])
        _, positions, updates = self._young[name]
        return positions, updates


def _step(first: Tensor, second: Tensor, group: Mapping[str, Any], steps: Tensor) -> Tensor:
    """Adam's step, without weight decay, of moments (n,) after `steps` of them, (n,) or one number."""
    beta1, beta2 = group["betas"]
    denominator = (second / (1 - beta2**steps)).sqrt_().add_(group["eps"])
    return float(group["lr"]) * first / ((1 - beta1**steps) * denominator)

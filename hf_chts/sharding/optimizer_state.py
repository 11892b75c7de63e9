"""What state an optimizer keeps for a weight, found out before training on a weight made for the purpose."""

import copy
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from hf_chts.sharding.interface import moments

_SHAPE = (3, 5)


def check_state(optimizer: Any) -> None:
    """Raises ValueError, naming the state, if an optimizer does not keep one value for each weight.

    A copy of the optimizer takes a step on a tiny weight. If that fails, the first real step is checked instead.
    """
    # those of torch are known (detect.py); DeepSpeed's share state with C++ that a copy would change
    if type(optimizer).__module__.startswith(("torch.optim.", "deepspeed.")):
        return
    state = _after_a_step(optimizer)
    if state is None:
        return
    try:
        moments(state, torch.empty(_SHAPE))
    except TypeError as error:
        kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        raise ValueError(f"the optimizer {kind} cannot be used: on a trial weight {error}") from error


def _after_a_step(optimizer: Any) -> dict[str, Any] | None:
    """The state that a copy of the optimizer keeps for a tiny weight after a step; None if the step fails."""
    like: Tensor = optimizer.param_groups[0]["params"][0]
    device = getattr(like, "device", torch.device("cpu"))
    devices = [device] if device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            weight = nn.Parameter(torch.ones(_SHAPE, device=device))
            weight.grad = torch.ones_like(weight)
            trial = optimizer.__new__(type(optimizer))
            trial.__dict__ = {name: _own(name, value) for name, value in optimizer.__dict__.items()}
            group = {
                name: copy.deepcopy(value) for name, value in optimizer.param_groups[0].items() if name != "params"
            }
            trial.param_groups = [group | {"params": [weight]}]
            trial.state = defaultdict(dict)
            type(trial).step(trial)
            return dict(trial.state[weight])
        except Exception:
            return None


def _own(name: str, value: Any) -> Any:
    """An attribute for a copy of an optimizer: without the user's hooks, and not shared if it can be written to."""
    if name.startswith("_optimizer_"):
        return OrderedDict()
    return copy.copy(value) if isinstance(value, dict | list | set) else value

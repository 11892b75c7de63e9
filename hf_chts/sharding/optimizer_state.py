"""What an optimizer will keep for a weight, found out before training on a weight that is no one's."""

import copy
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from hf_chts.sharding.interface import moments

_SHAPE = (3, 5)


def check_state(optimizer: Any) -> None:
    """Raises ValueError, naming the state, for an optimizer that keeps other than a value for each weight.

    A copy of it takes a step on a tiny weight. Where that fails nothing is known, and its state is looked at after the
    first real step.
    """
    # torch's keep a value for each weight or were told from those before; DeepSpeed's share what is not Python's
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
    """What a copy of the optimizer keeps of a tiny weight after a step; None where it cannot take one."""
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
    """An attribute for a copy of an optimizer: no hooks of the user's, and nothing shared that it could write into."""
    if name.startswith("_optimizer_"):
        return OrderedDict()
    return copy.copy(value) if isinstance(value, dict | list | set) else value

"""FSDP2 (`fully_shard`): every rank holds some rows of each weight, and of its moments.

The rows are the master weight. With a mixed precision policy each forward gathers a fresh copy in lower precision, so
an update changes the rows alone.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_chts.sharding.interface import HeldLayer, ShardedEngine, in_groups, moments
from hf_chts.sharding.partitions import held_part


class Fsdp2Weights(ShardedEngine):
    """Raises ValueError if a weight is not split by rows over all ranks: hybrid sharding, tensor parallelism."""

    def __init__(
        self,
        layers: Iterable[HeldLayer],
        optimizer: torch.optim.Optimizer,
        loss_scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.optimizer = self.stepping = optimizer
        self.loss_scale = loss_scale
        super().__init__(layers)

    def optimizes(self, layer: HeldLayer) -> bool:
        return in_groups(layer.parameter, self.optimizer)

    def find_extent(self, layer: HeldLayer) -> tuple[int, int]:
        part, start = held_part(_sharded(layer))
        return start, start + part.numel()

    def held(self, layer: HeldLayer) -> dict[str, Tensor]:
        weight = _sharded(layer)
        held = {"weight": weight.detach().to_local()}  # type: ignore[attr-defined]
        if weight.grad is not None:
            held["gradient"] = weight.grad.to_local()  # type: ignore[attr-defined]
        found = moments(self.optimizer.state.get(weight, {}), weight)
        return held | {name: value.to_local() for name, value in found.items() if isinstance(value, DTensor)}


def _sharded(layer: HeldLayer) -> DTensor:
    weight = layer.parameter
    if not isinstance(weight, DTensor):
        raise RuntimeError("a weight is gathered at the moment: ask between a backward pass and the next forward")
    return weight


def check_fsdp2(model: nn.Module, layers: Mapping[str, HeldLayer]) -> None:
    """Raises ValueError, naming the layer, if a weight is not under `fully_shard`."""
    managed = {
        id(module) for wrapper in model.modules() if isinstance(wrapper, FSDPModule) for module in wrapper.modules()
    }
    for name, layer in layers.items():
        if id(layer) not in managed or not isinstance(layer.parameter, DTensor):
            raise ValueError(
                f"{name} is a {type(layer.parameter).__name__} outside fully_shard: tensor parallelism is not supported"
            )

"""FSDP2 (`fully_shard`): every rank holds some rows of each weight, and of its moments.

The rows are the master weight: with a mixed precision policy the forward gathers a copy of lower precision, anew after
every step. So nothing but the rows has to change.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_chts.sharding.interface import ShardedEngine, SparseLayer, in_groups, moments
from hf_chts.sharding.partitions import held_part


class Fsdp2Weights(ShardedEngine):
    """Raises ValueError where a weight is not split by rows over all ranks (no hybrid, no tensor parallelism)."""

    def __init__(
        self,
        layers: Iterable[SparseLayer],
        optimizer: torch.optim.Optimizer,
        loss_scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.optimizer = optimizer
        self.loss_scale = loss_scale
        super().__init__(layers)

    def optimizes(self, layer: SparseLayer) -> bool:
        return in_groups(layer.weight, self.optimizer)

    def find_extent(self, layer: SparseLayer) -> tuple[int, int]:
        part, start = held_part(_sharded(layer))
        return start, start + part.numel()

    def held(self, layer: SparseLayer) -> dict[str, Tensor]:
        weight = _sharded(layer)
        held = {"weight": weight.detach().to_local()}  # type: ignore[attr-defined]
        if weight.grad is not None:
            held["gradient"] = weight.grad.to_local()  # type: ignore[attr-defined]
        found = moments(self.optimizer.state.get(weight, {}), weight)
        return held | {name: value.to_local() for name, value in found.items() if isinstance(value, DTensor)}


def _sharded(layer: SparseLayer) -> DTensor:
    weight = layer.weight
    if not isinstance(weight, DTensor):
        raise RuntimeError("a weight is gathered at the moment: ask between a backward pass and the next forward")
    return weight


def check_fsdp2(model: nn.Module, layers: Mapping[str, SparseLayer]) -> None:
    """Raises ValueError, naming the layer, if a weight is not under `fully_shard`."""
    managed = {
        id(module) for wrapper in model.modules() if isinstance(wrapper, FSDPModule) for module in wrapper.modules()
    }
    for name, layer in layers.items():
        if id(layer) not in managed or not isinstance(layer.weight, DTensor):
            raise ValueError(
                f"{name} is a {type(layer.weight).__name__} outside fully_shard: tensor parallelism is not supported"
            )

"""DeepSpeed ZeRO: an fp32 master weight in flat partitions, and a working weight that only follows it when it steps.

Nothing here imports deepspeed: all that is needed hangs on the parameters and on the optimizer that it wraps.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hf_chts.sharding.interface import ShardedEngine, SparseLayer, moments
from hf_chts.sharding.partitions import held_part


class ZeroStage12Weights(ShardedEngine):
    """Stages 1 and 2: the working weight is whole on every rank, master weight and moments are split.

    A partition is cut anywhere, through rows too, and a rank may hold nothing of a weight.

    Args:
        optimizer: DeepSpeed's, which wraps the one that steps.
    """

    def __init__(self, layers: Iterable[SparseLayer], optimizer: Any) -> None:
        self.optimizer = optimizer
        self.loss_scale = lambda: float(getattr(optimizer, "loss_scale", 1.0))
        super().__init__(layers)

    def optimizes(self, layer: SparseLayer) -> bool:
        return hasattr(layer.weight, "_hp_mapping")  # None on a rank that holds nothing of it

    def find_extent(self, layer: SparseLayer) -> tuple[int, int]:
        mapping = getattr(layer.weight, "_hp_mapping", None)
        if mapping is None:
            return 0, 0
        address = mapping.lp_fragment_address
        return address.start, address.start + address.numel

    def held(self, layer: SparseLayer) -> dict[str, Tensor]:
        if not self.optimizes(layer):
            return {}
        mapping = layer.weight._hp_mapping  # type: ignore[attr-defined]
        # nothing of any partition where this rank holds nothing of the weight: empty tensors with the usual names
        group, start, size = 0, 0, 0
        if mapping is not None:
            address = mapping.hp_fragment_address
            group, start, size = mapping.param_group_index, address.start, address.numel
        wrapped = self.optimizer.optimizer
        return _cut(wrapped, wrapped.param_groups[group]["params"][0], start, size)

    def copies(self, layer: SparseLayer) -> dict[str, Tensor]:
        weight = layer.weight
        gradients = {"gradient": weight.grad}
        gradients |= {name: getattr(weight, name, None) for name in ("grad_accum", "_hp_grad")}
        return {"working": weight.detach()} | {
            name: grad for name, grad in gradients.items() if grad is not None and grad.shape == weight.shape
        }


class ZeroStage3Weights(ShardedEngine):
    """Stage 3: the working weight is split too, padded to an equal number of elements on each rank.

    Small weights that DeepSpeed keeps gathered are whole on every rank beside that.

    Args:
        optimizer: DeepSpeed's, which wraps the one that steps.
    """

    def __init__(self, layers: Iterable[SparseLayer], optimizer: Any) -> None:
        self.optimizer = optimizer
        self.loss_scale = lambda: float(optimizer.loss_scale)
        super().__init__(layers)

    def optimizes(self, layer: SparseLayer) -> bool:
        return self.optimizer.get_param_id(layer.weight) in self.optimizer.grad_position

    def find_extent(self, layer: SparseLayer) -> tuple[int, int]:
        part, start = held_part(layer.weight)
        return start, start + part.numel()

    def held(self, layer: SparseLayer) -> dict[str, Tensor]:
        weight: Any = layer.weight
        if not self.optimizes(layer):
            return {"working": held_part(weight)[0]}
        start, stop = self.extent(layer)
        group, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(weight)]
        flat = self.optimizer.fp32_partitioned_groups_flat[group]
        held = _cut(self.optimizer.optimizer, flat, offset, stop - start)
        held["working"], _ = held_part(weight)
        if not self.optimizer.offload_optimizer:
            gradient, _ = self.optimizer._get_fp32_grad_state_partition(weight, False)
            held["gradient"] = gradient.view(-1)[: stop - start]
        return held

    def copies(self, layer: SparseLayer) -> dict[str, Tensor]:
        weight: Any = layer.weight
        return {"working": weight.detach()} if weight.ds_status.name == "AVAILABLE" else {}


def _cut(optimizer: torch.optim.Optimizer, flat: Tensor, start: int, size: int) -> dict[str, Tensor]:
    """A stretch of a flat partition, of its gradient if it has one, and of its moments."""
    held = {"weight": flat.detach()}
    if flat.grad is not None:
        held["gradient"] = flat.grad
    held |= moments(optimizer.state.get(flat, {}), flat)
    return {name: tensor.narrow(0, start, size) for name, tensor in held.items()}

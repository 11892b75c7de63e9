"""DeepSpeed ZeRO: fp32 master weights in flat partitions, and working weights that follow them after each step.

Nothing here imports deepspeed: everything needed is in attributes of the parameters and of the wrapped optimizer.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_chts.sharding.interface import HeldLayer, ShardedEngine, Stepped, moments
from hf_chts.sharding.partitions import held_part


class ZeroStage12Weights(ShardedEngine):
    """Stages 1 and 2: working weights are whole on every rank, master weights and moments are split.

    Partitions may be cut within a row, and a rank may hold nothing of a weight.

    Args:
        optimizer: DeepSpeed's, which wraps the one that steps.
    """

    def __init__(self, layers: Iterable[HeldLayer], optimizer: Any) -> None:
        self.optimizer, self.stepping = optimizer, optimizer.optimizer
        # in the groups of the optimizer that steps there is one at a time during a step
        names = (
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
        )  # the second: DeepSpeed's BF16_Optimizer
        self._partitions: list[Tensor] = next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))
        self.loss_scale = lambda: float(getattr(optimizer, "loss_scale", 1.0))
        super().__init__(layers)

    def optimizes(self, layer: HeldLayer) -> bool:
        return hasattr(layer.parameter, "_hp_mapping")  # None on a rank that holds nothing of it

    def find_extent(self, layer: HeldLayer) -> tuple[int, int]:
        mapping = getattr(layer.parameter, "_hp_mapping", None)
        if mapping is None:
            return 0, 0
        address = mapping.lp_fragment_address
        return address.start, address.start + address.numel

    def held(self, layer: HeldLayer) -> dict[str, Tensor]:
        if not self.optimizes(layer):
            return {}
        mapping = layer.parameter._hp_mapping  # type: ignore[attr-defined]
        # a rank that holds nothing of the weight gets empty tensors with the usual names
        group, start, size = 0, 0, 0
        if mapping is not None:
            address = mapping.hp_fragment_address
            group, start, size = mapping.param_group_index, address.start, address.numel
        return _cut(self.stepping, self._partitions[group], start, size)

    def stepped(self, layer: HeldLayer) -> Stepped | None:
        mapping = getattr(layer.parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        flat = self._partitions[mapping.param_group_index]
        return _stepped(self.stepping, flat, self.held(layer))

    def copies(self, layer: HeldLayer) -> dict[str, Tensor]:
        weight = layer.parameter
        gradients = {"gradient": weight.grad}
        gradients |= {name: getattr(weight, name, None) for name in ("grad_accum", "_hp_grad")}
        return {"working": weight.detach()} | {
            name: grad for name, grad in gradients.items() if grad is not None and grad.shape == weight.shape
        }


class ZeroStage3Weights(ShardedEngine):
    """Stage 3: working weights are split too, and padded to the same number of elements on each rank.

    Small weights that DeepSpeed keeps gathered are whole on every rank as well.

    Args:
        optimizer: DeepSpeed's, which wraps the one that steps.
    """

    def __init__(self, layers: Iterable[HeldLayer], optimizer: Any) -> None:
        self.optimizer, self.stepping = optimizer, optimizer.optimizer
        self.loss_scale = lambda: float(optimizer.loss_scale)
        super().__init__(layers)

    def optimizes(self, layer: HeldLayer) -> bool:
        return self.optimizer.get_param_id(layer.parameter) in self.optimizer.grad_position

    def find_extent(self, layer: HeldLayer) -> tuple[int, int]:
        part, start = held_part(layer.parameter)
        return start, start + part.numel()

    def held(self, layer: HeldLayer) -> dict[str, Tensor]:
        weight: Any = layer.parameter
        if not self.optimizes(layer):
            return {"working": held_part(weight)[0]}
        start, stop = self.extent(layer)
        group, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(weight)]
        flat = self.optimizer.fp32_partitioned_groups_flat[group]
        held = _cut(self.stepping, flat, offset, stop - start)
        held["working"], _ = held_part(weight)
        if not self.optimizer.offload_optimizer:
            gradient, _ = self.optimizer._get_fp32_grad_state_partition(weight, False)
            held["gradient"] = gradient.view(-1)[: stop - start]
        return held

    def stepped(self, layer: HeldLayer) -> Stepped | None:
        if not self.optimizes(layer):
            return None
        group, _, _ = self.optimizer.grad_position[self.optimizer.get_param_id(layer.parameter)]
        return _stepped(self.stepping, self.optimizer.fp32_partitioned_groups_flat[group], self.held(layer))

    def copies(self, layer: HeldLayer) -> dict[str, Tensor]:
        weight: Any = layer.parameter
        return {"working": weight.detach()} if weight.ds_status.name == "AVAILABLE" else {}


def _stepped(optimizer: torch.optim.Optimizer, flat: Tensor, held: dict[str, Tensor]) -> Stepped | None:
    """DeepSpeed lets the optimizer step on one partition after the other: it has only that one in its groups then."""
    for group in optimizer.param_groups:
        if any(one is flat for one in group["params"]) and flat in optimizer.state:
            return Stepped(held, optimizer.state[flat]["step"], group)
    return None


def clear_padding(model: nn.Module, optimizer: Any) -> None:
    """Set the padding of weights to 0 under stage 3.

    DeepSpeed leaves it uninitialized and takes optimizer steps on it, so NaN in it would look like divergence.

    Args:
        optimizer: Accelerate's or DeepSpeed's.
    """
    while type(optimizer).__module__.startswith("accelerate.") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    places = getattr(optimizer, "grad_position", {})
    for weight in model.parameters():
        split: Any = weight
        if not hasattr(split, "ds_tensor"):
            continue
        part, _ = held_part(weight)
        split.ds_tensor.data.view(-1)[part.numel() :] = 0
        number = optimizer.get_param_id(weight) if places else None
        if number in places:
            group, offset, _ = places[number]
            master = optimizer.fp32_partitioned_groups_flat[group]
            if master is not None and master.numel():  # else it is on disk
                master.data[offset + part.numel() : offset + split.partition_numel()] = 0


def _cut(optimizer: torch.optim.Optimizer, flat: Tensor, start: int, size: int) -> dict[str, Tensor]:
    """A range of a flat partition, of its gradient if there is one, and of its moments."""
    held = {"weight": flat.detach()}
    if flat.grad is not None:
        held["gradient"] = flat.grad
    held |= moments(optimizer.state.get(flat, {}), flat)
    return {name: tensor.narrow(0, start, size) for name, tensor in held.items()}

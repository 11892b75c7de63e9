"""The dense gradient of a layer, as it would be without the mask, for the rank that evolves the layer."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from hf_chts.sharding.ranks import rank_and_world


class DenseGradient(ABC):
    """Adds up a layer's dense gradient over the micro-batches of a step, in fp32.

    Args:
        shape, device: those of the dense weight, in the layer's own layout.
        owner: the rank that receives the mean over all ranks.
        loss_scale: returns the factor of the loss; called in the backward pass.
    """

    def __init__(self, shape: torch.Size, device: torch.device, owner: int, loss_scale: Callable[[], float]) -> None:
        self.shape, self.device = shape, device
        self.owner = owner
        self.loss_scale = loss_scale
        self.sum: Tensor | None = None

    @abstractmethod
    def add_(self, grad: Tensor) -> None:
        """Called in the backward pass with the gradient of a micro-batch, of the weight's shape."""

    @abstractmethod
    def mean(self) -> Tensor | None:
        """The mean over ranks of the sum over micro-batches, fp32 of the weight's shape; None if this rank is not the
        owner. Collective; call it once."""

    def _accumulate(self, grad: Tensor) -> None:
        if self.sum is None:
            self.sum = torch.zeros(self.shape, dtype=torch.float32, device=self.device)
        self.sum.add_(grad, alpha=1 / self.loss_scale())

    def _take_mean(self) -> Tensor:
        _, world_size = rank_and_world()
        if self.sum is None:  # the layer took no part in the step
            return torch.zeros(self.shape, dtype=torch.float32, device=self.device)
        total, self.sum = self.sum, None
        return total.div_(world_size)


class LocalGradient(DenseGradient):
    """Each rank sums up its own gradients, and one reduction at the end adds them up, as under DDP."""

    def add_(self, grad: Tensor) -> None:
        self._accumulate(grad)

    def mean(self) -> Tensor | None:
        rank, world_size = rank_and_world()
        mean = self._take_mean()
        if world_size > 1:
            dist.reduce(mean, dst=self.owner)
        return mean if rank == self.owner else None


class ReducedGradient(DenseGradient):
    """The owner keeps the sum of all ranks; the others keep nothing.

    Each micro-batch is reduced inside its backward pass, between the engine's own collectives. All ranks go through the
    same graph in the same order, so they agree on the order of collectives too.
    """

    def add_(self, grad: Tensor) -> None:
        rank, world_size = rank_and_world()
        if world_size > 1:
            # a copy, because the reduction overwrites it and the gradient itself is still needed
            grad = grad.to(torch.float32, copy=True).contiguous()
            dist.reduce(grad, dst=self.owner)
        if rank == self.owner:
            self._accumulate(grad)

    def mean(self) -> Tensor | None:
        return self._take_mean() if rank_and_world()[0] == self.owner else None

"""One process, or DDP: every rank holds every weight and every moment whole."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_chts.sharding.gradients import DenseGradient, LocalGradient
from hf_chts.sharding.interface import Engine, SparseLayer, in_groups, moments
from hf_chts.sharding.ranks import rank_and_world


class ReplicatedWeights(Engine):
    """Args (beside the optimizer and the loss scale):
    mixing: whether the optimizer may move a weight because of others, as Muon does by making its steps orthogonal; or
        keep sums over rows and columns, as Adafactor does. Weights are then masked again after each step, and of its
        state what has a value for each weight.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        loss_scale: Callable[[], float] = lambda: 1.0,
        *,
        mixing: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.loss_scale = loss_scale
        self.moves_missing_links = mixing

    def _moments(self, layer: SparseLayer) -> dict[str, Tensor]:
        state = self.optimizer.state.get(layer.weight, {})
        return moments(state, layer.weight, elementwise=not self.moves_missing_links)

    def optimizes(self, layer: SparseLayer) -> bool:
        return in_groups(layer.weight, self.optimizer)

    def extents(self, layer: SparseLayer) -> Sequence[tuple[int, int]]:
        return [(0, layer.storage.parameter_shape.numel())] * rank_and_world()[1]

    def held(self, layer: SparseLayer) -> dict[str, Tensor]:
        weight = layer.weight
        held = {"weight": weight.detach()}
        if weight.grad is not None:
            held["gradient"] = weight.grad
        return held | self._moments(layer)

    def whole(self, layer: SparseLayer, piece: Tensor | None = None) -> Tensor:
        return layer.weight.detach() if piece is None else piece

    def gather(
        self, destinations: Sequence[tuple[SparseLayer, int]], pieces: Sequence[Tensor] | None = None
    ) -> list[Tensor | None]:
        rank, _ = rank_and_world()
        tensors = [layer.weight.detach() for layer, _ in destinations] if pieces is None else pieces
        return [
            tensor if destination == rank else None
            for tensor, (_, destination) in zip(tensors, destinations, strict=True)
        ]

    def dense_gradient(self, layer: SparseLayer, owner: int) -> DenseGradient:
        return LocalGradient(layer.storage.weight_shape, layer.storage.device, owner, self.loss_scale)

"""One process, or DDP: every rank holds every weight and every moment whole."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_chts.layers.masked_layer import MaskedLayer
from hf_chts.training.sharding.gradients import DenseGradient, LocalGradient
from hf_chts.training.sharding.interface import Engine, moments
from hf_chts.training.sharding.ranks import rank_and_world


class ReplicatedWeights(Engine):
    def __init__(self, optimizer: torch.optim.Optimizer, loss_scale: Callable[[], float] = lambda: 1.0) -> None:
        self.optimizer = optimizer
        self.loss_scale = loss_scale

    def extents(self, layer: MaskedLayer) -> Sequence[tuple[int, int]]:
        return [(0, layer.mask.numel())] * rank_and_world()[1]

    def held(self, layer: MaskedLayer) -> dict[str, Tensor]:
        weight = layer.weight
        held = {"weight": weight.detach()}
        if weight.grad is not None:
            held["gradient"] = weight.grad
        return held | moments(self.optimizer.state.get(weight, {}), weight)

    def whole(self, layer: MaskedLayer, piece: Tensor | None = None) -> Tensor:
        return layer.weight.detach() if piece is None else piece

    def gather(
        self, destinations: Sequence[tuple[MaskedLayer, int]], pieces: Sequence[Tensor] | None = None
    ) -> list[Tensor | None]:
        rank, _ = rank_and_world()
        tensors = [layer.weight.detach() for layer, _ in destinations] if pieces is None else pieces
        return [
            tensor if destination == rank else None
            for tensor, (_, destination) in zip(tensors, destinations, strict=True)
        ]

    def dense_gradient(self, layer: MaskedLayer, owner: int) -> DenseGradient:
        return LocalGradient(layer.mask, owner, self.loss_scale)

"""One process, or DDP: every rank holds every weight and every moment whole."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_chts.sharding.gradients import DenseGradient, LocalGradient
from hf_chts.sharding.interface import Engine, HeldLayer, in_groups, moments
from hf_chts.sharding.ranks import rank_and_world


class ReplicatedWeights(Engine):
    """Args (beside the optimizer and the loss scale):
    mixing: whether the optimizer lets other weights move a weight, as Muon does with orthogonal steps, or keeps sums
        over rows and columns, as Adafactor does. Then weights, and state with a value for each weight, are masked again
        after each step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        loss_scale: Callable[[], float] = lambda: 1.0,
        *,
        mixing: bool = False,
    ) -> None:
        self.optimizer = self.stepping = optimizer
        self.loss_scale = loss_scale
        self.moves_missing_links = mixing
        self.resizes = rank_and_world()[1] == 1  # DDP has buckets for parameters of the sizes that they had

    def _moments(self, layer: HeldLayer) -> dict[str, Tensor]:
        state = self.optimizer.state.get(layer.parameter, {})
        return moments(state, layer.parameter, elementwise=not self.moves_missing_links)

    def optimizes(self, layer: HeldLayer) -> bool:
        return in_groups(layer.parameter, self.optimizer)

    def extents(self, layer: HeldLayer) -> Sequence[tuple[int, int]]:
        return [(0, layer.storage.parameter_shape.numel())] * rank_and_world()[1]

    def held(self, layer: HeldLayer) -> dict[str, Tensor]:
        weight = layer.parameter
        held = {"weight": weight.detach()}
        if weight.grad is not None:
            held["gradient"] = weight.grad
        return held | self._moments(layer)

    def whole(self, layer: HeldLayer, piece: Tensor | None = None) -> Tensor:
        return layer.parameter.detach() if piece is None else piece

    def gather(
        self, destinations: Sequence[tuple[HeldLayer, int]], pieces: Sequence[Tensor] | None = None
    ) -> list[Tensor | None]:
        rank, _ = rank_and_world()
        tensors = [layer.parameter.detach() for layer, _ in destinations] if pieces is None else pieces
        return [
            tensor if destination == rank else None
            for tensor, (_, destination) in zip(tensors, destinations, strict=True)
        ]

    def keep(self, layer: HeldLayer, elements: Tensor) -> None:
        # another parameter, since graphs of earlier steps, which may still be there, know this one by its shape
        old, owner = layer.parameter, cast(Any, layer)
        names = list(self._moments(layer))
        new = nn.Parameter(old.detach()[elements], old.requires_grad)
        setattr(owner, owner.parameter_name, new)
        if old in self.optimizer.state:
            state = self.optimizer.state.pop(old)
            self.optimizer.state[new] = state | {name: state[name][elements] for name in names}
        for group in self.optimizer.param_groups:
            group["params"] = [new if one is old else one for one in group["params"]]

    def dense_gradient(self, layer: HeldLayer, owner: int) -> DenseGradient:
        return LocalGradient(layer.storage.weight_shape, layer.storage.device, owner, self.loss_scale)

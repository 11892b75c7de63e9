"""The weights of removed links, for methods whose regrown links start with the weight that they had."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_chts.sharding.interface import Engine
from hf_chts.sharding.ranks import rank_and_world


class StoredWeights(ABC):
    """The last weights of the removed links of one layer; 0 for a place that never had a link."""

    @abstractmethod
    def parts(self) -> list[Tensor]:
        """What this rank holds, to look for NaN in."""

    @abstractmethod
    def matrix(self, engine: Engine) -> Tensor:
        """The weights as a matrix (out, in) on every rank, read only; entries of links are arbitrary.

        Collective if the engine splits weights.
        """

    @abstractmethod
    def bring(self, engine: Engine, rank: int) -> Callable[[], Tensor] | None:
        """Bring the weights to one rank, which gets a function that makes the matrix; the others get None.

        Collective if the engine splits weights. A matrix is as large as the dense weight: make one at a time.
        """

    @abstractmethod
    def saved(self, engine: Engine) -> dict[str, Tensor]:
        """What a checkpoint keeps, by kind; on rank 0. Collective where the engine splits weights.

        `stored` alone is a matrix (out, in); with `left` it has the values of links at these positions.
        """


class StoredParts(StoredWeights):
    """A dense weight, of which each rank has the part that it has of the weight itself.

    Args:
        layer: whose.
        part: as `Engine.zeros` makes it.
    """

    def __init__(self, layer: Any, part: Tensor) -> None:
        self.layer, self.part = layer, part

    def parts(self) -> list[Tensor]:
        return [self.part]

    def matrix(self, engine: Engine) -> Tensor:
        return self.layer.storage.matrix(engine.whole(self.layer, self.part))

    def bring(self, engine: Engine, rank: int) -> Callable[[], Tensor] | None:
        (whole,) = engine.gather([(self.layer, rank)], [self.part])
        return None if whole is None else partial(self.layer.storage.matrix, whole)

    def saved(self, engine: Engine) -> dict[str, Tensor]:
        whole = self.bring(engine, rank=0)
        return {} if whole is None else {"stored": whole()}


class StoredLinks(StoredWeights):
    """The weights of the links that left, whole on every rank.

    Attributes:
        positions: int64 (n,), ascending, in the flattened weight.
        values: (n,), of the dtype of the optimizer's weight.
    """

    def __init__(self, layer: Any, positions: Tensor, values: Tensor) -> None:
        self.layer = layer
        order = positions.argsort()
        self.positions, self.values = positions[order], values[order]

    def parts(self) -> list[Tensor]:
        return [self.values]

    def take(self, positions: Tensor) -> Tensor:
        """The weights at positions, (n,); 0 where no link has left."""
        if not len(self.positions):
            return self.values.new_zeros(positions.shape)
        places = torch.searchsorted(self.positions, positions).clamp_(max=len(self.positions) - 1)
        return self.values[places].where(self.positions[places] == positions, 0)

    def change(self, come: Tensor, gone: Tensor, weights: Tensor) -> None:
        """Forget the links that come, and keep those that go with their weights; all (n,)."""
        others = ~torch.isin(self.positions, torch.cat([come, gone]), assume_unique=True)
        positions = torch.cat([self.positions[others], gone])
        order = positions.argsort()
        self.positions = positions[order]
        self.values = torch.cat([self.values[others], weights.to(self.values)])[order]

    def bring(self, engine: Engine, rank: int) -> Callable[[], Tensor] | None:
        return partial(self.matrix, engine) if rank == rank_and_world()[0] else None

    def matrix(self, engine: Engine) -> Tensor:
        shape = self.layer.storage.weight_shape
        flat = self.values.new_zeros(shape.numel()).index_copy_(0, self.positions, self.values)
        return self.layer.matrix(flat.view(shape))

    def saved(self, engine: Engine) -> dict[str, Tensor]:
        return {"stored": self.values, "left": self.positions}

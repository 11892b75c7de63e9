"""The interface of engines to the weights of sparse layers.

On each rank an engine holds one contiguous range of a parameter's elements: all of them, some rows, or any other range.
Engines say which range that is and which tensors cover it. Everything else is the same for all engines.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hf_chts.sharding.gradients import DenseGradient, ReducedGradient
from hf_chts.sharding.partitions import whole_weight
from hf_chts.sharding.ranks import rank_and_world


class Storage(Protocol):
    """What engines need to know about a layer's storage (hf_chts/layers/links.py)."""

    @property
    def device(self) -> torch.device: ...
    @property
    def weight_shape(self) -> torch.Size: ...
    @property
    def parameter_shape(self) -> torch.Size: ...


class HeldLayer(Protocol):
    """A layer whose weight an engine holds."""

    @property
    def parameter(self) -> Tensor: ...
    @property
    def storage(self) -> Storage: ...


class Stepped(NamedTuple):
    """The part of a layer that an optimizer has stepped on.

    Attributes:
        held: see `Engine.held`.
        step: the optimizer's number of steps.
        group: its parameter group.
    """

    held: dict[str, Tensor]
    step: Tensor | float
    group: Mapping[str, Any]


class Engine(ABC):
    """Says where parameters, gradients and optimizer moments of sparse layers are on this rank, and moves them.

    Everything has the layout of the layer's parameter, `layer.storage.parameter_shape`. All ranks call the methods
    marked collective, for the same layers in the same order.
    """

    #: whether each rank holds only a part of a weight, so that whole weights have to be gathered
    sharded: ClassVar[bool] = False

    #: whether the optimizer may move weights whose gradient is 0, so that missing links are reset to 0 after each step
    moves_missing_links: bool = False

    #: whether a parameter may change its size between two steps, which `keep` does
    resizes: bool = False

    #: torch's optimizer, which takes the steps
    stepping: torch.optim.Optimizer

    #: returns the current factor of the loss, and so of the gradients: the scale of a gradient scaler
    loss_scale: Callable[[], float] = staticmethod(lambda: 1.0)

    @abstractmethod
    def extents(self, layer: HeldLayer) -> Sequence[tuple[int, int]]:
        """(start, stop) of the elements that each rank holds, by rank; (n, n) if it holds none."""

    @abstractmethod
    def optimizes(self, layer: HeldLayer) -> bool:
        """Whether the optimizer has the layer's parameter. It lacks those that were frozen when it was made."""

    def trained(self, layers: Mapping[str, HeldLayer]) -> list[str]:
        """The names of the layers whose weights train at this moment, on every rank. Collective.

        The other layers are frozen, or were never given to the optimizer.
        """
        trains = [layer.parameter.requires_grad and self.optimizes(layer) for layer in layers.values()]
        if layers and rank_and_world()[1] > 1:
            agreed = torch.tensor(trains, dtype=torch.int32, device=next(iter(layers.values())).storage.device)
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
            trains = agreed.bool().tolist()
        return [name for name, train in zip(layers, trains, strict=True) if train]

    @abstractmethod
    def held(self, layer: HeldLayer) -> dict[str, Tensor]:
        """The live tensors that cover this rank's extent, by name: flat, or whole in the parameter's shape.

        "weight" comes first and is what the optimizer steps on: the fp32 master weight where the engine has one. Others
        may be "working" (the weight of the forward), "gradient", and the optimizer's moments by the optimizer's names.
        If the optimizer does not have the parameter, some of these are missing.
        """

    def stepped(self, layer: HeldLayer) -> Stepped | None:
        """What the optimizer has just stepped on, for its post-step hook; None if it took no step on the layer here."""
        parameter, optimizer = layer.parameter, self.stepping
        state = optimizer.state.get(parameter)
        if not state or parameter.grad is None:
            return None
        group = next(group for group in optimizer.param_groups if any(one is parameter for one in group["params"]))
        return Stepped(self.held(layer), state["step"], group)

    def copies(self, layer: HeldLayer) -> dict[str, Tensor]:
        """Live tensors that this rank holds whole in addition to its extent, by name, in the parameter's shape.

        The names are the same on all ranks.
        """
        return {}

    def extent(self, layer: HeldLayer) -> tuple[int, int]:
        """(start, stop) of the elements that this rank holds."""
        return self.extents(layer)[rank_and_world()[0]]

    def gather(
        self, destinations: Sequence[tuple[HeldLayer, int]], pieces: Sequence[Tensor] | None = None
    ) -> list[Tensor | None]:
        """Gather whole weights, each on one rank. Collective.

        These are the optimizer's weights: the fp32 master weights if there are any. In bf16 there would be ties that a
        run on another engine does not have, and so another topology.

        Args:
            destinations: (layer, rank) pairs: the rank that receives the weight of the layer. A rank holds everything
                it receives at the same time.
            pieces: tensors to gather instead of the weights, one for each pair, that cover this rank's extent, such as
                those of `held` and `zeros`.

        Returns:
            For each pair a tensor of the parameter's shape, read only, if the destination is this rank, else None.
        """
        rank, _ = rank_and_world()
        found: list[Tensor | None] = []
        transfers = []
        for tag, (layer, destination) in enumerate(destinations):
            piece = (self.held(layer)["weight"] if pieces is None else pieces[tag]).detach().reshape(-1)
            extents = self.extents(layer)
            if destination == rank:
                whole = torch.empty(layer.storage.parameter_shape, dtype=piece.dtype, device=layer.storage.device)
                for source, (start, stop) in enumerate(extents):
                    part = whole.view(-1)[start:stop]
                    if source == rank:
                        part.copy_(piece)
                    elif start < stop:
                        transfers.append(dist.P2POp(dist.irecv, part, source, tag=tag))
                found.append(whole)
            else:
                if piece.numel():
                    piece = piece.to(layer.storage.device)
                    transfers.append(dist.P2POp(dist.isend, piece, destination, tag=tag))
                found.append(None)
        if transfers:
            for work in dist.batch_isend_irecv(transfers):
                work.wait()
        return found

    def whole(self, layer: HeldLayer, piece: Tensor | None = None) -> Tensor:
        """The whole weight on every rank, or the tensor of which `piece` is this rank's part; read only. Collective."""
        if piece is None and not self.optimizes(layer):
            return whole_weight(layer.parameter)
        (tensor,) = self.gather([(layer, 0)], None if piece is None else [piece])
        if tensor is None:
            like = self.held(layer)["weight"] if piece is None else piece
            tensor = torch.empty(layer.storage.parameter_shape, dtype=like.dtype, device=layer.storage.device)
        dist.broadcast(tensor, src=0)
        return tensor

    def zeros(self, layer: HeldLayer) -> Tensor:
        """Zeros that cover this rank's extent, with the dtype of the weight."""
        return torch.zeros_like(self.held(layer)["weight"])

    def part_of(self, layer: HeldLayer, whole: Tensor) -> Tensor:
        """A copy of this rank's extent of a tensor of the parameter's shape, in the form that `zeros` has."""
        start, stop = self.extent(layer)
        part = self.zeros(layer)
        return part.copy_(whole.reshape(-1)[start:stop].view_as(part))

    def keep(self, layer: HeldLayer, elements: Tensor) -> None:
        """Reduce the parameter and its optimizer state to these elements, int64 (n,); only if `resizes`."""
        raise NotImplementedError

    def dense_gradient(self, layer: HeldLayer, owner: int) -> DenseGradient:
        """The accumulator to set as `layer.dense_gradient` during a step, whose mean goes to rank `owner`."""
        return ReducedGradient(layer.storage.weight_shape, layer.storage.device, owner, self.loss_scale)

    def spread(self, layer: HeldLayer, positions: Tensor, mine: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Broadcast the values that each rank has for its own extent. Collective.

        Args:
            positions: int64 (n,), positions in the whole flattened parameter, ascending; the same on all ranks.
            mine: the values at the positions in this rank's extent.

        Returns:
            (positions, values) of each rank in turn.
        """
        rank, _ = rank_and_world()
        for source, (start, stop) in enumerate(self.extents(layer)):
            bounds = torch.tensor((start, stop), device=positions.device)
            first, last = torch.searchsorted(positions, bounds).tolist()
            if first < last:
                device = layer.storage.device
                values = mine.to(device) if source == rank else mine.new_empty(last - first, device=device)
                dist.broadcast(values, src=source)
                yield positions[first:last], values


class ShardedEngine(Engine):
    """An engine that splits weights over all ranks. Collective to make.

    Raises:
        ValueError: a weight is not split over all ranks into one contiguous range each.
    """

    sharded = True

    def __init__(self, layers: Iterable[HeldLayer]) -> None:
        layers = list(layers)
        mine = [self.find_extent(layer) for layer in layers]
        _, world_size = rank_and_world()
        everyone = [mine] * world_size
        if world_size > 1:
            dist.all_gather_object(everyone, mine)
        self._extents = {layer: [of_rank[i] for of_rank in everyone] for i, layer in enumerate(layers)}
        for layer, extents in self._extents.items():
            if not self.optimizes(layer):
                continue
            end = 0
            for start, stop in sorted(extent for extent in extents if extent[0] < extent[1]):
                if start != end:
                    break
                end = stop
            if end != layer.storage.parameter_shape.numel():
                raise ValueError(
                    f"a weight of shape {tuple(layer.storage.parameter_shape)} is not split over all {world_size} "
                    f"ranks into one contiguous range each, but as {extents}: hierarchical and tensor parallel layouts "
                    "are not supported"
                )

    @abstractmethod
    def find_extent(self, layer: HeldLayer) -> tuple[int, int]:
        """(start, stop) of the elements that this rank holds."""

    def extents(self, layer: HeldLayer) -> Sequence[tuple[int, int]]:
        return self._extents[layer]


def in_groups(weight: Tensor, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a weight is in one of the parameter groups of torch's optimizer."""
    return any(parameter is weight for group in optimizer.param_groups for parameter in group["params"])


def moments(state: dict[str, object], like: Tensor, *, elementwise: bool = True) -> dict[str, Tensor]:
    """The tensors of an optimizer's state that have a value for each element of `like`.

    Raises:
        TypeError: with `elementwise`, a tensor has neither one value nor one for each element.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() <= 1 < like.numel():
            continue
        if value.shape != like.shape:
            if not elementwise:
                if value.shape[1:] == like.shape:  # several values for each element, stacked along the first dimension
                    found |= {f"{name}[{i}]": one for i, one in enumerate(value)}
                continue
            raise TypeError(
                f"the optimizer's state {name!r} is {tuple(value.shape)} for a weight of {tuple(like.shape)}: what it "
                "holds of a link that goes cannot be set to 0. Use an optimizer with elementwise state, such as AdamW"
            )
        found[name] = value
    return found

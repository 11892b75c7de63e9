"""What every engine can tell and do about the weights of masked layers.

Every engine that we know holds, on each rank, one run of a weight's elements, in the order in which they lie: all of
them, some rows, or any stretch. Engines say which run that is and which tensors cover it; the rest is the same for all.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hf_chts.sharding.gradients import DenseGradient, ReducedGradient
from hf_chts.sharding.partitions import whole_weight
from hf_chts.sharding.ranks import rank_and_world


class Storage(Protocol):
    """What engines ask of how a layer's links are stored (hf_chts/layers/links.py)."""

    @property
    def device(self) -> torch.device: ...
    @property
    def weight_shape(self) -> torch.Size: ...
    @property
    def parameter_shape(self) -> torch.Size: ...


class SparseLayer(Protocol):
    """A layer whose weight an engine holds."""

    weight: Tensor

    @property
    def storage(self) -> Storage: ...


class Engine(ABC):
    """Holds the parameters, gradients and optimizer moments of sparse layers: says where they are, and moves them.

    Everything has the layout of the layer's parameter, `layer.storage.parameter_shape`. All ranks call the methods
    marked collective, for the same layers in the same order.
    """

    #: whether a rank holds a part of each weight, so that whole ones must be gathered
    sharded: ClassVar[bool] = False

    #: whether the optimizer may move a weight whose gradient is 0, so that missing links must be set to 0 after a step
    moves_missing_links: bool = False

    #: what multiplies the loss, hence the gradients, at this moment: that of a gradient scaler
    loss_scale: Callable[[], float] = staticmethod(lambda: 1.0)

    @abstractmethod
    def extents(self, layer: SparseLayer) -> Sequence[tuple[int, int]]:
        """(start, stop) of the elements of the layer's weight that each rank holds, by rank; (n, n) for none."""

    @abstractmethod
    def optimizes(self, layer: SparseLayer) -> bool:
        """Whether the optimizer has the layer's weight: it has not what was frozen when it was made."""

    def trained(self, layers: Mapping[str, SparseLayer]) -> list[str]:
        """The names of the layers whose weights train at this moment, on every rank. Collective.

        The others were frozen, or never given to the optimizer.
        """
        trains = [layer.weight.requires_grad and self.optimizes(layer) for layer in layers.values()]
        if layers and rank_and_world()[1] > 1:
            agreed = torch.tensor(trains, dtype=torch.int32, device=next(iter(layers.values())).storage.device)
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
            trains = agreed.bool().tolist()
        return [name for name, train in zip(layers, trains, strict=True) if train]

    @abstractmethod
    def held(self, layer: SparseLayer) -> dict[str, Tensor]:
        """The live tensors that cover this rank's extent, by name: flat, or whole and of the weight's shape.

        "weight" comes first and is what the optimizer steps on: the fp32 master weight where the engine has one. Others
        may be "working" (the weight of the forward), "gradient", and the optimizer's moments by the optimizer's names.
        Of a weight that the optimizer does not have, what there is.
        """

    def copies(self, layer: SparseLayer) -> dict[str, Tensor]:
        """The live tensors that this rank holds whole beside its extent, by name, of the weight's shape.

        Which there are is the same on all ranks.
        """
        return {}

    def extent(self, layer: SparseLayer) -> tuple[int, int]:
        """(start, stop) of the elements of the layer's weight that this rank holds."""
        return self.extents(layer)[rank_and_world()[0]]

    def gather(
        self, destinations: Sequence[tuple[SparseLayer, int]], pieces: Sequence[Tensor] | None = None
    ) -> list[Tensor | None]:
        """Bring whole weights together, each on one rank. Collective.

        It is the optimizer's weight, the fp32 master where there is one: bf16 would make ties that a run on another
        engine does not have, and so other topologies.

        Args:
            destinations: (layer, rank) pairs: which rank gets the weight of which layer. A rank holds all that it is
                to get at the same time.
            pieces: what to bring together instead of the weights: for each pair, a tensor that covers this rank's
                extent, such as one of `held` or `store`.

        Returns:
            For each pair a tensor of the weight's shape, to read, where the destination is this rank, else None.
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

    def whole(self, layer: SparseLayer, piece: Tensor | None = None) -> Tensor:
        """The whole weight, or what `piece` is this rank's extent of, on every rank, to read. Collective."""
        if piece is None and not self.optimizes(layer):
            return whole_weight(layer.weight)
        (tensor,) = self.gather([(layer, 0)], None if piece is None else [piece])
        if tensor is None:
            like = self.held(layer)["weight"] if piece is None else piece
            tensor = torch.empty(layer.storage.parameter_shape, dtype=like.dtype, device=layer.storage.device)
        dist.broadcast(tensor, src=0)
        return tensor

    def zeros(self, layer: SparseLayer) -> Tensor:
        """Zeros that cover this rank's extent, of the weight's dtype, to keep something of a layer in."""
        return torch.zeros_like(self.held(layer)["weight"])

    def part_of(self, layer: SparseLayer, whole: Tensor) -> Tensor:
        """This rank's extent of a tensor of the parameter's shape, as a tensor of its own such as `zeros` makes."""
        start, stop = self.extent(layer)
        part = self.zeros(layer)
        return part.copy_(whole.reshape(-1)[start:stop].view_as(part))

    def dense_gradient(self, layer: SparseLayer, owner: int) -> DenseGradient:
        """What to set as `layer.dense_gradient` for the micro-batches of a step, for rank `owner` to have the mean."""
        return ReducedGradient(layer.storage.weight_shape, layer.storage.device, owner, self.loss_scale)

    def spread(self, layer: SparseLayer, positions: Tensor, mine: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Give every rank the values that each knows for its own extent. Collective.

        Args:
            positions: in the whole flattened parameter, ascending; the same on all ranks.
            mine: the values at those that are in this rank's extent.

        Returns:
            (positions, values) of one rank after the other.
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
        ValueError: a weight is not split over all ranks in one run of elements each.
    """

    sharded = True

    def __init__(self, layers: Iterable[SparseLayer]) -> None:
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
                    f"ranks in one run of elements each, but as {extents}: hierarchical and tensor parallel layouts "
                    "are not supported"
                )

    @abstractmethod
    def find_extent(self, layer: SparseLayer) -> tuple[int, int]:
        """(start, stop) of the elements that this rank holds."""

    def extents(self, layer: SparseLayer) -> Sequence[tuple[int, int]]:
        return self._extents[layer]


def in_groups(weight: Tensor, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a weight is in one of the parameter groups of torch's optimizer."""
    return any(parameter is weight for group in optimizer.param_groups for parameter in group["params"])


def moments(state: dict[str, object], like: Tensor, *, elementwise: bool = True) -> dict[str, Tensor]:
    """The tensors of an optimizer's state that have a value for each element of `like`.

    Raises:
        TypeError: `elementwise`, and there is a tensor that has neither one value nor one for each element.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() <= 1 < like.numel():
            continue
        if value.shape != like.shape:
            if not elementwise:
                if value.shape[1:] == like.shape:  # several values for each element, one after the other
                    found |= {f"{name}[{i}]": one for i, one in enumerate(value)}
                continue
            raise TypeError(
                f"the optimizer's state {name!r} is {tuple(value.shape)} for a weight of {tuple(like.shape)}: what it "
                "holds of a link that goes cannot be set to 0. Use an optimizer with elementwise state, such as AdamW"
            )
        found[name] = value
    return found

"""What every engine can tell and do about the weights of masked layers.

Every engine that we know holds, on each rank, one run of a weight's elements, in the order in which they lie: all of
them, some rows, or any stretch. Engines say which run that is and which tensors cover it; the rest is the same for all.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_chts.layers.masked_layer import MaskedLayer
from hf_chts.sharding.gradients import DenseGradient, ReducedGradient
from hf_chts.sharding.partitions import whole_weight
from hf_chts.sharding.ranks import rank_and_world
from hf_chts.topology.bits import link_positions

# What torch's Adamax and Rprop keep of each weight is above 0 from the first step on, by which a weight whose gradient
# is 0 does not move
_NEVER_ZERO = ("exp_inf", "step_size")


class Engine(ABC):
    """Holds the weights, gradients and optimizer moments of masked layers.

    Everything is laid out as the weight lies, `layer.mask.shape`; `layer.matrix` views it as (out, in). The methods
    that are said to be collective are called by all ranks, for the same layers in the same order.
    """

    #: whether a rank holds a part of each weight, so that whole ones must be gathered
    sharded: ClassVar[bool] = False

    #: what multiplies the loss, hence the gradients, at this moment: that of a gradient scaler
    loss_scale: Callable[[], float] = staticmethod(lambda: 1.0)

    @abstractmethod
    def extents(self, layer: MaskedLayer) -> Sequence[tuple[int, int]]:
        """(start, stop) of the elements of the layer's weight that each rank holds, by rank; (n, n) for none."""

    @abstractmethod
    def optimizes(self, layer: MaskedLayer) -> bool:
        """Whether the optimizer has the layer's weight: it has not what was frozen when it was made."""

    def trained(self, layers: Mapping[str, MaskedLayer]) -> list[str]:
        """The names of the layers whose weights train at this moment, on every rank. Collective.

        The others were frozen, or never given to the optimizer.
        """
        trains = [layer.weight.requires_grad and self.optimizes(layer) for layer in layers.values()]
        if layers and rank_and_world()[1] > 1:
            agreed = torch.tensor(trains, dtype=torch.int32, device=next(iter(layers.values())).mask.device)
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
            trains = agreed.bool().tolist()
        return [name for name, train in zip(layers, trains, strict=True) if train]

    @abstractmethod
    def held(self, layer: MaskedLayer) -> dict[str, Tensor]:
        """The live tensors that cover this rank's extent, by name: flat, or whole and of the weight's shape.

        "weight" comes first and is what the optimizer steps on: the fp32 master weight where the engine has one. Others
        may be "working" (the weight of the forward), "gradient", and the optimizer's moments by the optimizer's names.
        Of a weight that the optimizer does not have, what there is.
        """

    def copies(self, layer: MaskedLayer) -> dict[str, Tensor]:
        """The live tensors that this rank holds whole beside its extent, by name, of the weight's shape.

        Which there are is the same on all ranks.
        """
        return {}

    def extent(self, layer: MaskedLayer) -> tuple[int, int]:
        """(start, stop) of the elements of the layer's weight that this rank holds."""
        return self.extents(layer)[rank_and_world()[0]]

    def gather(
        self, destinations: Sequence[tuple[MaskedLayer, int]], pieces: Sequence[Tensor] | None = None
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
                whole = torch.empty(layer.mask.shape, dtype=piece.dtype, device=layer.mask.device)
                for source, (start, stop) in enumerate(extents):
                    part = whole.view(-1)[start:stop]
                    if source == rank:
                        part.copy_(piece)
                    elif start < stop:
                        transfers.append(dist.P2POp(dist.irecv, part, source, tag=tag))
                found.append(whole)
            else:
                if piece.numel():
                    piece = piece.to(layer.mask.device)
                    transfers.append(dist.P2POp(dist.isend, piece, destination, tag=tag))
                found.append(None)
        if transfers:
            for work in dist.batch_isend_irecv(transfers):
                work.wait()
        return found

    def whole(self, layer: MaskedLayer, piece: Tensor | None = None) -> Tensor:
        """The whole weight, or what `piece` is this rank's extent of, on every rank, to read. Collective."""
        if piece is None and not self.optimizes(layer):
            return whole_weight(layer.weight)
        (tensor,) = self.gather([(layer, 0)], None if piece is None else [piece])
        if tensor is None:
            like = self.held(layer)["weight"] if piece is None else piece
            tensor = torch.empty(layer.mask.shape, dtype=like.dtype, device=layer.mask.device)
        dist.broadcast(tensor, src=0)
        return tensor

    @torch.no_grad()
    def set_topology(self, layer: MaskedLayer, mask: Tensor, stored: Tensor | None = None) -> None:
        """Give the layer a new mask; every weight, gradient and moment of the links that go becomes 0. Collective.

        Links that come were 0 in all of them, by the invariant, and stay so; with `stored` they start with its weight,
        and the weights of the links that go are put there.

        Args:
            mask: bool of the weight's shape, the same on all ranks.
            stored: what `store` or `cut` returned for the layer.
        """
        mask = mask.to(layer.mask.device)
        held, copies = self.held(layer), self.copies(layer)
        gone = link_positions(layer.mask & ~mask)
        for tensor in copies.values():
            _fill(tensor, gone)
        here = self._here(layer, gone)
        if stored is not None:
            come = link_positions(mask & ~layer.mask)
            weight = held["weight"]
            start, stop = self.extent(layer)
            links = layer.mask.reshape(-1)[start:stop].to(stored.device)
            revived = stored.take(self._here(layer, come).to(stored.device))
            torch.where(links.view_as(stored), weight.view_as(stored), stored, out=stored)
        for tensor in held.values():
            _fill(tensor, here)
        if stored is not None:
            for name in ("weight", "working"):
                if name in held:
                    _put(held[name], self._here(layer, come), revived)
            if "working" in copies:
                self._spread(layer, copies["working"], come, revived)
        layer.mask.copy_(mask)

    def store(self, layer: MaskedLayer) -> Tensor:
        """Zeros that cover this rank's extent, to keep the weights of links that left."""
        return torch.zeros_like(self.held(layer)["weight"])

    def cut(self, layer: MaskedLayer, whole: Tensor) -> Tensor:
        """This rank's extent of a tensor of the weight's shape, as a tensor of its own such as `store` makes."""
        start, stop = self.extent(layer)
        store = self.store(layer)
        return store.copy_(whole.reshape(-1)[start:stop].view_as(store))

    def dense_gradient(self, layer: MaskedLayer, owner: int) -> DenseGradient:
        """What to set as `layer.dense_gradient` for the micro-batches of a step, for rank `owner` to have the mean."""
        return ReducedGradient(layer.mask, owner, self.loss_scale)

    def after_step(self, layers: Iterable[MaskedLayer]) -> None:  # noqa: B027 - most optimizers need nothing
        """Called after each optimizer step, for engines whose optimizer may have moved missing links."""

    @torch.no_grad()
    def forget_missing(self, layers: Iterable[MaskedLayer]) -> None:
        """Set to 0, off the masks, all that the optimizer keeps: moments, gradients and master weights.

        For an optimizer that stepped on other masks. The weights of the forward stay as they are.
        """
        for layer in layers:
            held, copies = self.held(layer), self.copies(layer)
            of_forward = "working" if "working" in held or "working" in copies else "weight"
            start, stop = self.extent(layer)
            missing = ~layer.mask.reshape(-1)
            for tensors, off in ((held, missing[start:stop]), (copies, missing)):
                for name, tensor in tensors.items():
                    if name != of_forward:
                        tensor.masked_fill_(off.view(tensor.shape).to(tensor.device), 0)

    def strays(self, layer: MaskedLayer, *, finite: bool = False) -> dict[str, int]:
        """How many elements are not 0 off the mask, by the names of `held` and `copies`, on this rank.

        Args:
            finite: count no NaN and no infinite ones.
        """
        start, stop = self.extent(layer)
        missing = ~layer.mask.reshape(-1)
        counts: dict[str, int] = {}
        for tensors, off in ((self.held(layer), missing[start:stop]), (self.copies(layer), missing)):
            for name, tensor in tensors.items():
                if name in _NEVER_ZERO:
                    continue
                values = tensor.detach().reshape(-1)
                nonzero = values != 0
                if finite:
                    nonzero &= values.isfinite()
                counts[name] = counts.get(name, 0) + int((nonzero & off.to(nonzero.device)).sum())
        return counts

    def check(self, layers: dict[str, MaskedLayer]) -> None:
        """Raises RuntimeError, naming layer and tensor, if anything this rank holds is not 0 off a mask."""
        for name, layer in layers.items():
            strays = {tensor: count for tensor, count in self.strays(layer).items() if count}
            if strays:
                raise RuntimeError(
                    f"{name} is not 0 off its mask: {strays} elements. Something wrote past the mask, or the optimizer "
                    "moves weights whose gradient is 0"
                )

    def _here(self, layer: MaskedLayer, positions: Tensor) -> Tensor:
        """The positions, ascending, that are in this rank's extent, counted from its start."""
        return _within(positions, self.extent(layer))

    def _spread(self, layer: MaskedLayer, copy: Tensor, come: Tensor, revived: Tensor) -> None:
        """Put the weights of the links that come, which each rank knows for its own extent, into the whole copies."""
        rank, _ = rank_and_world()
        for source, (start, stop) in enumerate(self.extents(layer)):
            here = _within(come, (start, stop))
            if here.numel():
                values = revived.to(copy.device) if source == rank else revived.new_empty(len(here), device=copy.device)
                dist.broadcast(values, src=source)
                _put(copy, here + start, values)


class ShardedEngine(Engine):
    """An engine that splits weights over all ranks. Collective to make.

    Raises:
        ValueError: a weight is not split over all ranks in one run of elements each.
    """

    sharded = True

    def __init__(self, layers: Iterable[MaskedLayer]) -> None:
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
            if end != layer.mask.numel():
                raise ValueError(
                    f"a weight of shape {tuple(layer.mask.shape)} is not split over all {world_size} ranks in one run "
                    f"of elements each, but as {extents}: hierarchical and tensor parallel layouts are not supported"
                )

    @abstractmethod
    def find_extent(self, layer: MaskedLayer) -> tuple[int, int]:
        """(start, stop) of the elements that this rank holds."""

    def extents(self, layer: MaskedLayer) -> Sequence[tuple[int, int]]:
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


def _within(positions: Tensor, extent: tuple[int, int]) -> Tensor:
    first, last = torch.searchsorted(positions, torch.tensor(extent, device=positions.device)).tolist()
    return positions[first:last] - extent[0]


def _fill(tensor: Tensor, positions: Tensor) -> None:
    positions = positions.to(tensor.device)
    if tensor.is_contiguous():
        tensor.view(-1).index_fill_(0, positions, 0)
    else:
        tensor.put_(positions, tensor.new_zeros(positions.shape))


def _put(tensor: Tensor, positions: Tensor, values: Tensor) -> None:
    tensor.put_(positions.to(tensor.device), values.to(tensor.device, tensor.dtype))

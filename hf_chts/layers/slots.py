"""The links of a layer that keeps a value for each of them, in slots, and no dense weight.

The parameter of the layer is a vector with one slot for each link, and `link_positions` says where in the flattened
weight the link of each slot is. An update gives the slots of links that go to links that come; nothing else moves and
no shape changes. So whoever holds the parameter, its gradient and its moments, whole or in parts, holds an ordinary
small vector and need not know.

Where sparsity rises, the slots are as many as the links at the densest moment. A slot without a link has the position
one past the last, and value, gradient and moments 0.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_chts.layers.link_index import LinkIndex
from hf_chts.layers.links import NEVER_ZERO, LinkStorage, check_topology, in_place
from hf_chts.layers.stored_weights import StoredLinks, StoredWeights
from hf_chts.layers.weight_parts import Slots
from hf_chts.sharding.interface import Engine
from hf_chts.sharding.partitions import held_part
from hf_chts.topology.bits import link_positions


class SlotStorage(LinkStorage):
    """A value for each link in the parameter `link_values`, and a buffer `link_positions`, int32 where it is enough.

    Args:
        layer: the linked layer; its weight lies as (out, in), or (in, out) if it is `transposed`.
        shape: (out, in).
        slots: the number of slots.
        device: where the positions are kept.
        dense_bytes: how many bytes of the weight are made dense at a time.

    Attributes:
        index: the links in the order of products with them alone; None where the layer multiplies densely.
    """

    index: LinkIndex | None = None
    _sparse_up_to: int = -1

    def __init__(self, layer: Any, shape: tuple[int, int], slots: int, device: torch.device, dense_bytes: int) -> None:
        self._layer = layer
        self.shape = shape
        self.dense_bytes = dense_bytes
        self._order: tuple[int, Tensor | None] = (-1, None)  # the slots in order, at a version
        numel = shape[0] * shape[1]
        dtype = torch.int32 if numel < 2**31 else torch.int64
        positions = torch.full((slots,), numel, dtype=dtype, device=device)
        layer.register_buffer("link_positions", positions, persistent=False)

    @property
    def _positions(self) -> Tensor:
        return self._layer.link_positions

    @property
    def device(self) -> torch.device:
        return self._positions.device

    @property
    def weight_shape(self) -> torch.Size:
        rows, columns = self.shape
        return torch.Size((columns, rows) if self._layer.transposed else (rows, columns))

    @property
    def parameter_shape(self) -> torch.Size:
        return self._positions.shape

    @property
    def topology(self) -> Tensor:
        return self._layer.matrix(self._dense(self._positions.new_ones((), dtype=torch.bool)))

    def matrix(self, values: Tensor) -> Tensor:
        return self._layer.matrix(self._dense(values.reshape(-1)))

    def values(self, matrix: Tensor) -> Tensor:
        return self._padded(matrix)[self._positions.long()]

    def restore(self, topology: Tensor, slots: Tensor | None) -> None:
        if slots is None:
            self.copy(topology)
        else:
            self._place(slots)
        self.foreign = slots is None

    def multiply_links(self, up_to: int) -> None:
        """Have products take the links alone while there are no more than `up_to` of them: never, if it is negative."""
        self._sparse_up_to = up_to
        self._refresh_index()

    def _changed(self) -> None:
        self.version += 1
        self._refresh_index()

    def _refresh_index(self) -> None:
        if self.count > self._sparse_up_to or self.device.type != "cpu":
            self.index = None
            return
        if self.index is None or self.index.slots != self.room:
            self.index = LinkIndex.empty(self.room, self.shape)
        if self.index.version != self.version:
            self.index.refresh(self._positions, self._layer.transposed, self.version)

    @property
    def room(self) -> int:
        return self._positions.numel()

    @property
    def vacant(self) -> int:
        """The number of slots without a link."""
        return self.room - self.count

    def _counted(self) -> int:
        return self.room - int(torch.count_nonzero(self.missing()))

    def missing(self) -> Tensor:
        return self._positions == self.shape[0] * self.shape[1]

    def buffers(self) -> dict[str, Tensor]:
        return {"link_positions": self._positions}

    def converted(self, tensor: Tensor) -> Tensor:
        if tensor.shape != self.weight_shape:
            raise ValueError(
                f"a tensor of {tuple(tensor.shape)} in the checkpoint has no value for each weight of a layer of "
                f"{self.shape}: resume with storage: masked, as the checkpoint was written"
            )
        return self.values(self._layer.matrix(tensor.to(self.device)))

    @property
    def slot_positions(self) -> Tensor:
        return self._positions

    def nothing_stored(self, like: Tensor) -> dict[str, Tensor]:
        return {"stored": like.new_empty(0), "left": torch.empty(0, dtype=torch.int64)}

    def saved(self, values: Tensor) -> Tensor:
        return values.reshape(-1)

    def loaded(self, saved: Tensor, slots: Tensor | None) -> Tensor:
        return self.values(saved) if slots is None else saved

    def stored_weights(self, engine: Engine, saved: Mapping[str, Tensor] | None = None) -> StoredLinks:
        if saved is None:
            like = engine.held(self._layer)["weight"]
            positions = torch.empty(0, dtype=torch.int64, device=self.device)
            return StoredLinks(self._layer, positions, like.new_empty(0, device=self.device))
        if "left" in saved:
            return StoredLinks(self._layer, saved["left"].to(self.device), saved["stored"].to(self.device))
        whole = saved["stored"].to(self.device)
        positions = link_positions(self._layer.matrix((whole != 0) & ~self.topology))
        return StoredLinks(self._layer, positions, self._layer.matrix(whole).reshape(-1)[positions])

    def _place(self, positions: Tensor) -> None:
        """Take over which link is in which slot, and with it the number of slots."""
        numel = self.shape[0] * self.shape[1]
        links = positions[positions != numel]
        wrong = links.numel() and (int(links.min()) < 0 or int(links.max()) > numel)
        if positions.dim() != 1 or wrong or links.unique().numel() != links.numel():
            raise ValueError(
                f"{tuple(positions.shape)} positions do not fit a layer of {self.shape}: each link has a place of its "
                "own in the layer. The file is damaged, or of another model"
            )
        if positions.shape == self._positions.shape:
            self._positions.copy_(positions)
        else:
            self._resize(positions.to(self._positions))
        self._changed()

    def compact(self, engine: Engine) -> Tensor:
        """Give back the slots without a link, of the parameter and of all that the optimizer has of it.

        Returns:
            The slots that stay, int64 (links,), in their order.
        """
        kept = link_positions(~self.missing())
        engine.keep(self._layer, kept)
        self._layer.link_positions = self._positions[kept]
        self._changed()
        return kept

    def _resize(self, positions: Tensor) -> None:
        """Take over another number of slots, as allocation "global" makes it of other weights; their values are 0."""
        parameter = self._layer.parameter
        part, _ = held_part(parameter)
        if part.shape != self._positions.shape:
            raise ValueError(
                f"a checkpoint with {len(positions)} slots does not fit a layer with {len(self._positions)} that is "
                "split over ranks: sparsify the model before it is split"
            )
        self._layer.link_positions = positions.clone()
        parameter.data = parameter.data.new_zeros(positions.shape)
        parameter.grad = None

    def copy(self, topology: Tensor) -> None:
        self._check(topology)
        come = link_positions(self._layer.matrix(topology))
        self._positions.fill_(self.shape[0] * self.shape[1])
        self._positions[: len(come)] = come.to(self._positions)
        self._changed()

    @torch.no_grad()
    def replace(
        self,
        topology: Tensor,
        engine: Engine | None = None,
        stored: StoredWeights | None = None,
        stamp: tuple[Tensor, int] | None = None,
        change: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._check(topology)
        positions, numel = self._positions, self.shape[0] * self.shape[1]
        topology = topology.to(positions.device)
        stays = self._padded(topology)[positions.long()]
        gone = link_positions(~stays & (positions < numel))
        free = link_positions(~stays)  # the slots of links that go, and those without a link
        come = link_positions(self._layer.matrix(topology & ~self.topology))
        taken = free[: len(come)]
        if stored is not None:
            assert isinstance(stored, StoredLinks)
            assert engine is not None
            revived = stored.take(come)
            stored.change(come, positions[gone].long(), self._everywhere(engine, gone))
        for name, tensor, (start, stop) in self._held(engine):
            mine = gone[(gone >= start) & (gone < stop)] - start
            tensor.view(-1).index_fill_(0, mine.to(tensor.device), 0)
            if stored is not None and name in ("weight", "working"):
                here = (taken >= start) & (taken < stop)
                tensor.view(-1)[(taken[here] - start).to(tensor.device)] = revived[here].to(tensor)
        if stamp is not None:
            assert engine is not None
            piece, number = stamp
            start, stop = engine.extent(self._layer)
            for slots, value in ((gone, 0), (taken, number)):
                mine = slots[(slots >= start) & (slots < stop)] - start
                piece.view(-1).index_fill_(0, mine.to(piece.device), value)
        positions[gone] = numel
        positions[taken] = come.to(positions)
        self._changed()

    @torch.no_grad()
    def clear(self, engine: Engine, *, skip: Iterable[str] = ()) -> None:
        if self.vacant:
            vacant = self.missing()
            for name, tensor, (start, stop) in self._held(engine):
                if name not in skip:
                    tensor.view(-1).masked_fill_(vacant[start:stop].to(tensor.device), 0)

    def strays(self, engine: Engine | None = None, *, finite: bool = False) -> dict[str, int]:
        if not self.vacant:
            return {}
        vacant, counts = self.missing(), dict[str, int]()
        for name, tensor, (start, stop) in self._held(engine):
            if name not in NEVER_ZERO:
                values = tensor.detach().reshape(-1)
                nonzero = values.ne(0) & values.isfinite() if finite else values.ne(0)
                counts[name] = counts.get(name, 0) + int((nonzero & vacant[start:stop].to(nonzero.device)).sum())
        return counts

    def order(self) -> Tensor:
        """The slots that have a link, by ascending position: int64 (links,)."""
        order = self._positions.argsort()
        return order[: self.count]

    def slots(self, positions: Tensor, itemsize: int) -> Slots:
        """Where the slots lie, for products.

        Args:
            positions: `link_positions` of the layer that multiplies, which may be a replica on another device.
            itemsize: bytes of an element of the weight.
        """
        rows, columns = self.weight_shape
        row_bytes = columns * itemsize
        if rows * row_bytes <= self.dense_bytes:
            return Slots(positions, (rows, columns), self._layer.transposed)
        if self._order[0] != self.version:
            self._order = (self.version, self._positions.argsort().to(self._positions.dtype))
        block = max(1, self.dense_bytes // row_bytes)
        order = None if self._order[1] is None else self._order[1].to(positions.device)
        return Slots(positions, (rows, columns), self._layer.transposed, order, block)

    def _everywhere(self, engine: Engine, slots: Tensor) -> Tensor:
        """The optimizer's weights in these slots, ascending, on every rank. Collective where the engine splits them."""
        start, stop = engine.extent(self._layer)
        weight = engine.held(self._layer)["weight"].view(-1)
        mine = weight[(slots[(slots >= start) & (slots < stop)] - start).to(weight.device)].to(slots.device)
        if not engine.sharded:
            return mine
        parts = [values for _, values in engine.spread(self._layer, slots, mine)]
        return torch.cat(parts) if parts else mine

    def _dense(self, values: Tensor) -> Tensor:
        """Values of the slots, (slots,) or one for all, in the weight's layout."""
        return in_place(values.to(self.device).expand(self._positions.shape), self._positions, self.weight_shape)

    def _padded(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) flat in the weight's layout, and a 0 for slots without a link."""
        flat = self._layer.matrix(matrix).reshape(-1)
        return torch.cat([flat, flat.new_zeros(1)])

    def _check(self, topology: Tensor) -> None:
        check_topology(topology, self.shape)
        links, slots = int(torch.count_nonzero(topology)), self._positions.numel()
        if links > slots:  # an update finds that out before it begins
            raise ValueError(
                f"a topology of {links} links does not fit into the {slots} slots of this layer, which are as many as "
                "it has links at the densest moment of the schedule"
            )

    def _held(self, engine: Engine | None) -> list[tuple[str, Tensor, tuple[int, int]]]:
        """(name, tensor, extent): all that this rank holds of the parameter, and of which slots."""
        if engine is None:
            part, start = held_part(self._layer.parameter)
            return [("weight", part, (start, start + part.numel()))]
        whole = (0, self._positions.numel())
        here = [(name, tensor, engine.extent(self._layer)) for name, tensor in engine.held(self._layer).items()]
        return here + [(name, tensor, whole) for name, tensor in engine.copies(self._layer).items()]

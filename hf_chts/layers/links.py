"""The links of a layer: where they are, how values change with them, and the check that all other weights are 0.

Nothing else writes masks. Engines (hf_chts/sharding) only say where the bytes of a layer's parameter are, and move
them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_chts.layers.stored_weights import StoredParts, StoredWeights
from hf_chts.sharding.interface import Engine
from hf_chts.sharding.partitions import held_part, weight_shape
from hf_chts.topology.bits import link_positions

# torch's Adamax and Rprop keep these above 0 for every weight, which does not move weights whose gradient is 0
NEVER_ZERO = ("exp_inf", "step_size")


class LinkStorage(ABC):
    """How the links of one layer and their weights are stored.

    Attributes:
        shape: (out, in) of the layer.
        version: rises with every change of the links, so that data derived from them can be recognized as stale.
    """

    shape: tuple[int, int]
    version: int = 0
    #: whether gradients and moments are those of all weights, as methods need that let optimizer steps move missing
    #: links; only weights are 0 off the links then, between the update after a step and the next step. An evolver sets
    #: it while it is at work, so that a model is never trained that way without one
    trains_missing: bool = False
    foreign: bool = False  # whether the last restored checkpoint is of the other storage
    _count: tuple[int, int] = (-1, 0)  # the version that was counted, and its links

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the links."""

    @property
    @abstractmethod
    def weight_shape(self) -> torch.Size:
        """The shape of the plain layer's weight: (out, in), or (in, out) for Conv1D."""

    @property
    @abstractmethod
    def parameter_shape(self) -> torch.Size:
        """The shape of the whole trained parameter, which engines split and gather, and optimizers keep moments for."""

    @property
    @abstractmethod
    def topology(self) -> Tensor:
        """bool (out, in), True where there is a link; read only."""

    @property
    def count(self) -> int:
        """The number of links; counted once for each version."""
        if self._count[0] != self.version:
            self._count = (self.version, self._counted())
        return self._count[1]

    @property
    @abstractmethod
    def room(self) -> int:
        """The largest number of links that the layer can hold."""

    @abstractmethod
    def _counted(self) -> int:
        """Count the links."""

    def positions(self) -> Tensor:
        """The links' positions in the flattened (out, in) matrix, ascending: int64 (links,)."""
        return link_positions(self.topology)

    @abstractmethod
    def matrix(self, values: Tensor) -> Tensor:
        """Convert values of the parameter's shape to a matrix (out, in); entries without a link are arbitrary."""

    @abstractmethod
    def values(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`: convert a matrix (out, in) to values of the parameter's shape."""

    @abstractmethod
    def copy(self, topology: Tensor) -> None:
        """Set the topology, bool (out, in), but not weights and optimizer state, which are loaded separately."""

    @abstractmethod
    def restore(self, topology: Tensor, slots: Tensor | None) -> None:
        """Set the topology of a checkpoint, and its slots if it was written with links storage.

        Raises:
            ValueError: the slots do not fit the layer.
        """

    @abstractmethod
    def buffers(self) -> dict[str, Tensor]:
        """The layer's buffers that only this object writes, by name."""

    @abstractmethod
    def missing(self) -> Tensor:
        """bool of the parameter's shape, True for values without a link."""

    @property
    def slot_positions(self) -> Tensor | None:
        """The position of the link in each slot, integer (slots,), for `restore`; None without slots."""
        return None

    def nothing_stored(self, like: Tensor) -> dict[str, Tensor]:
        """What a checkpoint stores for a layer that has no weights of removed links."""
        return {"stored": like.new_zeros(self.shape)}

    @abstractmethod
    def converted(self, tensor: Tensor) -> Tensor:
        """Convert a weight or a moment from a checkpoint of the other storage to the parameter's shape.

        Raises:
            ValueError: the tensor does not fit the last restored topology, or has no value for each weight.
        """

    @abstractmethod
    def saved(self, values: Tensor) -> Tensor:
        """Convert values of the parameter's shape to the form that a checkpoint stores."""

    @abstractmethod
    def loaded(self, saved: Tensor, slots: Tensor | None) -> Tensor:
        """The inverse of `saved`, for a checkpoint with these slots, or without any."""

    @abstractmethod
    def stored_weights(self, engine: Engine, saved: Mapping[str, Tensor] | None = None) -> StoredWeights:
        """Where weights of removed links are kept: empty, or with those of a checkpoint (`StoredWeights.saved`)."""

    @abstractmethod
    def replace(
        self,
        topology: Tensor,
        engine: Engine | None = None,
        stored: StoredWeights | None = None,
        stamp: tuple[Tensor, int] | None = None,
        change: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Change the links. Collective where `engine` splits weights.

        Weight, gradient and optimizer moments of removed links become 0. New links start at 0, moments too. With
        `stored` they start at the stored value, and the weights of removed links are saved there.

        Args:
            topology: bool (out, in), the same on all ranks.
            engine: holds weight, gradient and moments; None if there is only the weight.
            stored: the weights of removed links.
            stamp: a tensor of this rank's part, as `Engine.zeros` makes it, and a number that it gets for new links;
                removed links get 0.
            change: the links that go and those that come, if the caller has counted them: their positions in the
                flattened (out, in) matrix, int64 (links,), ascending.

        Raises:
            ValueError: the topology is not bool (out, in).
        """

    @abstractmethod
    def clear(self, engine: Engine, *, skip: Iterable[str] = ()) -> None:
        """Set everything that the engine holds, except the names in `skip`, to 0 where there is no link."""

    @abstractmethod
    def strays(self, engine: Engine | None = None, *, finite: bool = False) -> dict[str, int]:
        """Count elements on this rank that are not 0 where there is no link, by the engine's names of its tensors.

        Args:
            engine: None checks the weight alone.
            finite: whether to leave out NaN and infinity.
        """


class MaskedStorage(LinkStorage):
    """A dense weight, 0 where there is no link, and a bool buffer `mask` of its shape.

    Args:
        layer: the masked layer; its weight may be split over ranks already.
        topology: bool (out, in).

    Raises:
        ValueError: the topology is not bool (out, in).
    """

    _slots: Tensor | None = None  # the slots of the last restored checkpoint, if it has any

    def __init__(self, layer: Any, topology: Tensor) -> None:
        self._layer = layer
        weight = layer.get_parameter("weight")
        mask = torch.zeros(weight_shape(weight), dtype=torch.bool, device=weight.device)
        rows, columns = layer.matrix(mask).shape
        self.shape = (rows, columns)
        check_topology(topology, self.shape)
        layer.register_buffer("mask", mask, persistent=False)  # state dicts have the keys of the plain layer
        self.copy(topology)

    @property
    def _mask(self) -> Tensor:
        return self._layer.mask

    @property
    def device(self) -> torch.device:
        return self._mask.device

    @property
    def weight_shape(self) -> torch.Size:
        return self._mask.shape

    @property
    def parameter_shape(self) -> torch.Size:
        return self._mask.shape

    @property
    def topology(self) -> Tensor:
        return self._layer.matrix(self._mask)

    def matrix(self, values: Tensor) -> Tensor:
        return self._layer.matrix(values)

    def values(self, matrix: Tensor) -> Tensor:
        return self._layer.matrix(matrix)

    def copy(self, topology: Tensor) -> None:
        check_topology(topology, self.shape)
        # in place: compiled graphs and CUDA graphs hold on to the buffer
        self.topology.copy_(topology)
        self.version += 1

    @property
    def room(self) -> int:
        return self._mask.numel()

    def _counted(self) -> int:
        return int(torch.count_nonzero(self._mask))

    def missing(self) -> Tensor:
        return ~self._mask

    def buffers(self) -> dict[str, Tensor]:
        return {"mask": self._mask}

    def restore(self, topology: Tensor, slots: Tensor | None) -> None:
        self.copy(topology)
        self._slots, self.foreign = slots, slots is not None

    def converted(self, tensor: Tensor) -> Tensor:
        if self._slots is None or tensor.shape != self._slots.shape:
            raise ValueError(
                f"a tensor of {tuple(tensor.shape)} in the checkpoint has no value for each of the slots of a layer of "
                f"{self.shape}: resume with storage: links, as the checkpoint was written"
            )
        return in_place(tensor, self._slots, self.weight_shape)

    def saved(self, values: Tensor) -> Tensor:
        return self.matrix(values)

    def loaded(self, saved: Tensor, slots: Tensor | None) -> Tensor:
        return self.values(saved) if slots is None else in_place(saved, slots, self.weight_shape)

    def stored_weights(self, engine: Engine, saved: Mapping[str, Tensor] | None = None) -> StoredParts:
        if saved is None:
            return StoredParts(self._layer, engine.zeros(self._layer))
        whole = self.loaded(saved["stored"], saved.get("left"))
        return StoredParts(self._layer, engine.part_of(self._layer, whole))

    @torch.no_grad()
    def replace(
        self,
        topology: Tensor,
        engine: Engine | None = None,
        stored: StoredWeights | None = None,
        stamp: tuple[Tensor, int] | None = None,
        change: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        check_topology(topology, self.shape)
        if engine is None:
            self.copy(topology)
            self.clear_weight()
            return
        if self.trains_missing:
            self.copy(topology)
            self.clear(engine)
            return
        layer, old = self._layer, self._mask
        new = self.values(topology).to(old.device)
        held, copies = engine.held(layer), engine.copies(layer)
        come: Tensor | None
        if change is not None and layer.matrix(old) is old:  # the weight lies as the matrix
            gone, come = change
        else:
            gone = link_positions(old & ~new)
            come = link_positions(new & ~old) if stored is not None or stamp is not None else None
        start, stop = extent = engine.extent(layer)
        gone_here = _within(gone, extent, old.numel())
        for tensor in copies.values():
            _fill(tensor, gone)
        if stored is not None:
            assert isinstance(stored, StoredParts)
            assert come is not None
            part = stored.part
            revived = part.take(_within(come, extent, old.numel()).to(part.device))
            links = old.reshape(-1)[start:stop].to(part.device)
            torch.where(links.view_as(part), held["weight"].view_as(part), part, out=part)
        for tensor in held.values():
            _fill(tensor, gone_here)
        if stored is not None:
            assert come is not None
            for name in ("weight", "working"):
                if name in held:
                    _put(held[name], _within(come, extent, old.numel()), revived)
            if "working" in copies:
                for positions, values in engine.spread(layer, come, revived):
                    _put(copies["working"], positions, values)
        if stamp is not None:
            assert come is not None
            piece, number = stamp
            _fill(piece, gone_here)
            _fill(piece, _within(come, extent, old.numel()), number)
        self.copy(topology)

    @torch.no_grad()
    def clear_weight(self) -> None:
        """Set this rank's part of the weight to 0 where there is no link."""
        for part, missing in self._weight_parts():
            part.masked_fill_(missing, 0)

    @torch.no_grad()
    def clear(self, engine: Engine, *, skip: Iterable[str] = ()) -> None:
        for name, tensor, missing in self._held(engine):
            if name not in skip:
                tensor.masked_fill_(missing.view(tensor.shape).to(tensor.device), 0)

    def strays(self, engine: Engine | None = None, *, finite: bool = False) -> dict[str, int]:
        if engine is None:
            # a gathered weight is counted twice: in this rank's part and in the whole
            return {"weight": max(int((p.detach().ne(0) & missing).sum()) for p, missing in self._weight_parts())}
        counts: dict[str, int] = {}
        for name, tensor, missing in self._held(engine):
            if name not in NEVER_ZERO:
                values = tensor.detach().reshape(-1)
                nonzero = values.ne(0) & values.isfinite() if finite else values.ne(0)
                counts[name] = counts.get(name, 0) + int((nonzero & missing.to(nonzero.device)).sum())
        return counts

    def _held(self, engine: Engine) -> list[tuple[str, Tensor, Tensor]]:
        """(name, tensor, missing) for everything this rank holds that is 0 off the links; `missing` is flat, True where
        there is no link."""
        start, stop = engine.extent(self._layer)
        missing = ~self._mask.reshape(-1)
        here = [(name, tensor, missing[start:stop]) for name, tensor in engine.held(self._layer).items()]
        found = here + [(name, tensor, missing) for name, tensor in engine.copies(self._layer).items()]
        return [one for one in found if one[0] in ("weight", "working")] if self.trains_missing else found

    def _weight_parts(self) -> list[tuple[Tensor, Tensor]]:
        """(part, missing) for this rank's parts of the weight; `missing` is True where there is no link."""
        weight: Tensor = self._layer.weight
        part, start = held_part(weight)
        missing = (~self._mask).to(part.device)
        if part.dim() == 1 != self._mask.dim():
            missing = missing.reshape(-1)[start : start + part.numel()]
        parts = [(part, missing)]
        if hasattr(weight, "ds_tensor") and weight.numel() == self._mask.numel():
            parts.append((weight.detach(), ~self._mask))  # gathered at the moment as well
        return parts


def in_place(values: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    """Values (n,) at their positions in a flattened tensor of `shape`, 0 elsewhere.

    Args:
        positions: integer (n,), each once; values at the position one past the last are left out.
    """
    flat = torch.zeros(shape.numel() + 1, dtype=values.dtype, device=values.device)
    flat.index_copy_(0, positions.long().to(values.device), values)
    return flat[:-1].view(shape)


def check_topology(topology: Tensor, shape: tuple[int, int]) -> None:
    """Raises ValueError if a topology is not bool of this shape."""
    if topology.dtype != torch.bool or tuple(topology.shape) != shape:
        raise ValueError(f"the mask of this layer is bool {shape}; got {topology.dtype} {tuple(topology.shape)}")


def check_zeros(layers: Mapping[str, Any], engine: Engine | None = None) -> None:
    """Raises RuntimeError that names layer and tensor if anything on this rank is not 0 where there is no link."""
    for name, layer in layers.items():
        strays = {tensor: count for tensor, count in layer.storage.strays(engine).items() if count}
        if strays:
            raise RuntimeError(
                f"{name} is not 0 off its mask: {strays} elements. Something wrote to the weight past the mask (assign "
                "weights before sparsify(), or call set_mask(layer.topology) after writing), or the optimizer moves "
                "weights whose gradient is 0"
            )


def _within(positions: Tensor, extent: tuple[int, int], numel: int) -> Tensor:
    """The ascending positions, of `numel`, that are in [start, stop), counted from start."""
    if extent == (0, numel):
        return positions
    first, last = torch.searchsorted(positions, torch.tensor(extent, device=positions.device)).tolist()
    return positions[first:last] - extent[0]


def _fill(tensor: Tensor, positions: Tensor, value: float = 0) -> None:
    positions = positions.to(tensor.device)
    if tensor.is_contiguous():
        tensor.view(-1).index_fill_(0, positions, value)
    else:
        tensor.put_(positions, tensor.new_full(positions.shape, value))


def _put(tensor: Tensor, positions: Tensor, values: Tensor) -> None:
    tensor.put_(positions.to(tensor.device), values.to(tensor.device, tensor.dtype))

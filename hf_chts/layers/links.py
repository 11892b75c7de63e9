"""The links of a layer: which there are, what becomes of values when they change, and whether all else is 0.

Everything that knows how weights and links belong together is here, and nothing else writes masks. Engines
(hf_chts/sharding) only say where the bytes of a layer's parameter are, and move them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_chts.sharding.interface import Engine
from hf_chts.sharding.partitions import held_part, weight_shape
from hf_chts.topology.bits import link_positions

# torch's Adamax and Rprop keep these above 0 for every weight from the first step on; a weight whose gradient is 0 does
# not move by them
_NEVER_ZERO = ("exp_inf", "step_size")


class LinkStorage(ABC):
    """How the links of one layer, and their weights, are stored.

    Attributes:
        shape: (out, in) of the layer.
        version: rises with every change of the links, so that what is derived from them knows when it is stale.
    """

    shape: tuple[int, int]
    version: int = 0
    _count: tuple[int, int] = (-1, 0)  # the version that was counted, and its links

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the links are kept."""

    @property
    @abstractmethod
    def weight_shape(self) -> torch.Size:
        """The shape of the dense weight, as it lies in the plain layer: (out, in), or (in, out) for Conv1D."""

    @property
    @abstractmethod
    def parameter_shape(self) -> torch.Size:
        """The shape of the whole trained parameter: what engines split, gather and keep moments of."""

    @property
    @abstractmethod
    def topology(self) -> Tensor:
        """bool (out, in), True where there is a link; to read."""

    @property
    def count(self) -> int:
        """The number of links; counted once for each version."""
        if self._count[0] != self.version:
            self._count = (self.version, int(torch.count_nonzero(self.topology)))
        return self._count[1]

    def positions(self) -> Tensor:
        """The links' positions in the flattened (out, in) matrix, ascending: int64 (links,)."""
        return link_positions(self.topology)

    @abstractmethod
    def matrix(self, values: Tensor) -> Tensor:
        """Values of the parameter's shape as a matrix (out, in), 0 or anything where there is no link."""

    @abstractmethod
    def values(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`: values of the parameter's shape, from a matrix (out, in)."""

    @abstractmethod
    def copy(self, topology: Tensor) -> None:
        """Take over a topology, bool (out, in), and leave weights and optimizer state to whoever loads them."""

    @abstractmethod
    def replace(
        self,
        topology: Tensor,
        engine: Engine | None = None,
        stored: Tensor | None = None,
        stamp: tuple[Tensor, int] | None = None,
    ) -> None:
        """Change the links. Collective where `engine` splits weights.

        Weight, gradient and optimizer moments of removed links become 0. New links start at 0, moments too. With
        `stored` they start at the stored value, and the weights of removed links are saved there.

        Args:
            topology: bool (out, in), the same on all ranks.
            engine: what holds weight, gradient and moments; None: there is only the weight.
            stored: this rank's part of the weights of removed links, as `Engine.zeros` made it.
            stamp: a tensor of this rank's part, as `stored`, and a number that it gets for new links; removed links get
                0.

        Raises:
            ValueError: the topology is not bool (out, in).
        """

    @abstractmethod
    def clear(self, engine: Engine, *, skip: Iterable[str] = ()) -> None:
        """Set to 0, where there is no link, everything that the engine holds but for the names in `skip`."""

    @abstractmethod
    def strays(self, engine: Engine | None = None, *, finite: bool = False) -> dict[str, int]:
        """How many elements on this rank are not 0 where there is no link, by the engine's names of what it holds.

        Args:
            engine: None: of the weight alone.
            finite: do not count NaN and infinity.
        """


class MaskedStorage(LinkStorage):
    """A dense weight, 0 where there is no link, and a bool buffer `mask` of its shape.

    Args:
        layer: the masked layer; its weight may be split over ranks already.
        topology: bool (out, in).

    Raises:
        ValueError: the topology is not bool (out, in).
    """

    def __init__(self, layer: Any, topology: Tensor) -> None:
        self._layer = layer
        weight = layer.get_parameter("weight")
        mask = torch.zeros(weight_shape(weight), dtype=torch.bool, device=weight.device)
        rows, columns = layer.matrix(mask).shape
        self.shape = (rows, columns)
        self._check(topology)
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
        self._check(topology)
        # in place: compiled graphs and CUDA graphs hold on to the buffer
        self.topology.copy_(topology)
        self.version += 1

    @torch.no_grad()
    def replace(
        self,
        topology: Tensor,
        engine: Engine | None = None,
        stored: Tensor | None = None,
        stamp: tuple[Tensor, int] | None = None,
    ) -> None:
        self._check(topology)
        if engine is None:
            self.copy(topology)
            self.clear_weight()
            return
        layer, old = self._layer, self._mask
        new = self.values(topology).to(old.device)
        held, copies = engine.held(layer), engine.copies(layer)
        gone = link_positions(old & ~new)
        come = link_positions(new & ~old) if stored is not None or stamp is not None else None
        start, stop = extent = engine.extent(layer)
        gone_here = _within(gone, extent)
        for tensor in copies.values():
            _fill(tensor, gone)
        if stored is not None:
            assert come is not None
            revived = stored.take(_within(come, extent).to(stored.device))
            links = old.reshape(-1)[start:stop].to(stored.device)
            torch.where(links.view_as(stored), held["weight"].view_as(stored), stored, out=stored)
        for tensor in held.values():
            _fill(tensor, gone_here)
        if stored is not None:
            assert come is not None
            for name in ("weight", "working"):
                if name in held:
                    _put(held[name], _within(come, extent), revived)
            if "working" in copies:
                for positions, values in engine.spread(layer, come, revived):
                    _put(copies["working"], positions, values)
        if stamp is not None:
            assert come is not None
            piece, number = stamp
            _fill(piece, gone_here)
            _fill(piece, _within(come, extent), number)
        self.copy(topology)

    @torch.no_grad()
    def clear_weight(self) -> None:
        """Set what this rank holds of the weight to 0 where there is no link."""
        for part, missing in self._weight_parts():
            part.masked_fill_(missing, 0)

    @torch.no_grad()
    def clear(self, engine: Engine, *, skip: Iterable[str] = ()) -> None:
        for name, tensor, missing in self._held(engine):
            if name not in skip:
                tensor.masked_fill_(missing.view(tensor.shape).to(tensor.device), 0)

    def strays(self, engine: Engine | None = None, *, finite: bool = False) -> dict[str, int]:
        if engine is None:
            # of a gathered weight the rank holds its part and the whole
            return {"weight": max(int((p.detach().ne(0) & missing).sum()) for p, missing in self._weight_parts())}
        counts: dict[str, int] = {}
        for name, tensor, missing in self._held(engine):
            if name not in _NEVER_ZERO:
                values = tensor.detach().reshape(-1)
                nonzero = values.ne(0) & values.isfinite() if finite else values.ne(0)
                counts[name] = counts.get(name, 0) + int((nonzero & missing.to(nonzero.device)).sum())
        return counts

    def _check(self, topology: Tensor) -> None:
        if topology.dtype != torch.bool or tuple(topology.shape) != self.shape:
            raise ValueError(
                f"the mask of this layer is bool {self.shape}; got {topology.dtype} {tuple(topology.shape)}"
            )

    def _held(self, engine: Engine) -> list[tuple[str, Tensor, Tensor]]:
        """(name, tensor, missing): all that this rank holds, each with where there is no link, flat."""
        start, stop = engine.extent(self._layer)
        missing = ~self._mask.reshape(-1)
        here = [(name, tensor, missing[start:stop]) for name, tensor in engine.held(self._layer).items()]
        return here + [(name, tensor, missing) for name, tensor in engine.copies(self._layer).items()]

    def _weight_parts(self) -> list[tuple[Tensor, Tensor]]:
        """What this rank holds of the weight, each part with where there is no link."""
        weight: Tensor = self._layer.weight
        part, start = held_part(weight)
        missing = (~self._mask).to(part.device)
        if part.dim() == 1 != self._mask.dim():
            missing = missing.reshape(-1)[start : start + part.numel()]
        parts = [(part, missing)]
        if hasattr(weight, "ds_tensor") and weight.numel() == self._mask.numel():
            parts.append((weight.detach(), ~self._mask))  # gathered at the moment as well
        return parts


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


def _within(positions: Tensor, extent: tuple[int, int]) -> Tensor:
    """The ascending positions that are in [start, stop), counted from start."""
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

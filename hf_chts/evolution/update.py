"""A topology update of the layers that one rank evolves, made of the config's parts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from hf_chts.config import SparsityConfig
from hf_chts.schedule_plan import SchedulePlan
from hf_chts.topology.allocation import block_links
from hf_chts.topology.evolution import Choice, LayerEvolution, joined, regrow, remove, selected
from hf_chts.topology.parts import REGROWTH, REMOVAL, Part
from hf_chts.topology.percolation import Junction, percolate
from hf_chts.topology.random_streams import random_stream
from hf_chts.topology.softness import temperature

# Layers that are evolved at the same time in one process; each takes several copies of itself in memory
_WORKERS = 4
_T = TypeVar("_T")


@dataclass(frozen=True)
class TopologyUpdate:
    """An update at one step, for any of the layers.

    Attributes:
        plan: the run's schedules.
        step: finished optimizer steps.
        masks: bool (out, in) of all layers, by name in the model's order; read only, and rarely, since each may be made
            on access.
        links: the number of links after the update, by layer name.
        gradients: the dense gradients of the step, (out, in) by layer name, where the config needs them.
        stored: the weights of removed links, (out, in) by layer name, where they are kept.
        junctions: how layers are coupled, for percolation; none without it.
        blocks: the number of blocks of rows that evolve on their own, by layer name; 1 where absent.
        softness: the softness δ of each layer's removal by name, where it adapts; else that of the plan.
    """

    plan: SchedulePlan
    step: int
    masks: Mapping[str, Tensor]
    links: Mapping[str, int]
    gradients: Mapping[str, Tensor]
    stored: Mapping[str, Tensor]
    junctions: Sequence[Junction] = ()
    blocks: Mapping[str, int] = field(default_factory=dict)
    softness: Mapping[str, float] = field(default_factory=dict)

    def evolve(self, group: Sequence[str], weights: Mapping[str, Tensor]) -> dict[str, LayerEvolution]:
        """Evolve layers that are coupled, or a single one.

        Args:
            group: their names.
            weights: (out, in) by name, 0 off the mask; read only.
        """
        # junctions may include layers that do not train; those keep all their links
        junctions = [junction for junction in self.junctions if set(junction.layers) & set(group)]
        met = [name for junction in junctions for name in junction.layers if name in self.masks]
        masks = {name: self.masks[name] for name in (*group, *met)}
        pieces = {name: self._pieces(name, masks[name]) for name in group}
        if self._part("regrowth").kind == "selection":
            return {name: joined([self._select(p, weights[name]) for p in pieces[name]]) for name in group}
        stay, kept = {}, {}
        for name in group:
            halves = [self._remove(piece, weights[name]) for piece in pieces[name]]
            stay[name], kept[name] = (_cat(parts) for parts in zip(*halves, strict=True))
        if junctions:
            fixed = {name: masks[name] for name in met if name not in kept}
            kept = percolate(kept | fixed, junctions, fixed)
        return {
            name: joined([self._regrow(piece, weights[name], stay[name], kept[name]) for piece in pieces[name]])
            for name in group
        }

    def _pieces(self, name: str, mask: Tensor) -> "list[_Piece]":
        n = self.blocks.get(name, 1)
        rows = [slice(len(mask) * i // n, len(mask) * (i + 1) // n) for i in range(n)]
        return [_Piece(name, rows[i], mask[rows[i]], block_links(self.links[name], i, n), i) for i in range(n)]

    def _select(self, piece: "_Piece", weight: Tensor) -> LayerEvolution:
        part = self._part("regrowth")
        given = self._given(part, piece, piece.mask, weight[piece.rows])
        chosen = part(self.plan.config, **given, links=piece.links, generator=self._stream(piece, "pruning"))
        return selected(piece.mask, part.check(chosen, tuple(piece.mask.shape), piece.links))

    def _remove(self, piece: "_Piece", weight: Tensor) -> tuple[Tensor, Tensor]:
        config = self.plan.config
        softness = self.softness.get(piece.layer)
        return remove(
            weight[piece.rows],
            piece.mask,
            links=piece.links,
            drop_fraction=self.plan.drop_fraction(self.step),
            removal=Choice(
                partial(self._score, "removal", piece),
                config.removal_choice == "soft",
                self.plan.temperature(self.step) if softness is None else temperature(softness),
            ),
            pruning=Choice(partial(self._score, "pruning", piece)),
            streams=partial(self._stream, piece),
        )

    def _regrow(self, piece: "_Piece", weight: Tensor, stay: Tensor, kept: Tensor) -> LayerEvolution:
        part = self._part("regrowth")

        def score(kept: Tensor) -> Tensor:
            left = weight[piece.rows].where(kept, 0) if "weight" in part.needs else None
            return self._score("regrowth", piece, left, kept)

        return regrow(
            piece.mask,
            stay[piece.rows],
            kept[piece.rows],
            links=piece.links,
            regrowth=Choice(score, self.plan.config.regrowth_choice == "soft", sampler=part.sampler),
            streams=partial(self._stream, piece),
        )

    def _part(self, field: str) -> Part:
        parts = REGROWTH if field == "regrowth" else REMOVAL
        return parts[getattr(self.plan.config, field)]

    def _score(self, field: str, piece: "_Piece", weight: Tensor | None, mask: Tensor) -> Tensor:
        part = self._part(field)
        return part.check(part(self.plan.config, **self._given(part, piece, mask, weight)), tuple(mask.shape))

    def _given(self, part: Part, piece: "_Piece", mask: Tensor, weight: Tensor | None) -> dict[str, Tensor | None]:
        """The arguments that a part may ask for: mask, weight, and the gradient and stored weights that it needs."""
        whole = {"grad": self.gradients, "stored": self.stored}
        rows = {name: tensors[piece.layer][piece.rows] for name, tensors in whole.items() if name in part.needs}
        return {"mask": mask, "weight": weight, **rows}

    def _stream(self, piece: "_Piece", purpose: str) -> torch.Generator:
        layer = list(self.masks).index(piece.layer)
        number = self.plan.number_of_updates(self.step)
        if piece.block:
            purpose = f"{purpose} {piece.block}"
        return random_stream(self.plan.config.topology_seed, number, layer, purpose, device=piece.mask.device)


@dataclass(frozen=True)
class _Piece:
    """Rows of a layer that evolve independently: all of them, or those of one attention head."""

    layer: str
    rows: slice
    mask: Tensor  # of these rows, before the update
    links: int
    block: int


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def in_threads(evolve: Callable[[list[str]], _T], groups: Sequence[list[str]], device: torch.device) -> Iterator[_T]:
    """Call `evolve` on every group, in order; on a CPU, on several groups at the same time.

    An update is many small operations, which gain little from several threads each. The results are the same, since
    every layer has its own random streams.
    """
    threads = torch.get_num_threads()
    workers = min(threads, _WORKERS, len(groups))
    if workers <= 1 or device.type != "cpu":
        yield from map(evolve, groups)
        return
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            yield from pool.map(evolve, groups)
    finally:
        torch.set_num_threads(threads)  # MKL's number of threads is global


def update_cost(shape: tuple[int, int], config: SparsityConfig) -> float:
    """Roughly how many operations an update of a layer of `shape` (out, in) takes, to share layers out over ranks."""
    part = REGROWTH[config.regrowth]
    drawn = config.regrowth_choice == "soft" and part.sampler is not None
    return (part.sampler_cost if drawn else part.cost)(*shape)

"""A topology update of the layers that one rank evolves, made of the config's parts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_chts.config import SparsityConfig
from hf_chts.layers.neurons import neuron_dimension
from hf_chts.schedule_plan import SchedulePlan
from hf_chts.topology import evolution, patterned_evolution
from hf_chts.topology.allocation import block_links
from hf_chts.topology.evolution import Choice, LayerEvolution, Removal, counts_of, joined, selected
from hf_chts.topology.parts import REGROWTH, REMOVAL, Part
from hf_chts.topology.patterns import highest
from hf_chts.topology.percolation import Junction, percolate
from hf_chts.topology.random_streams import generator_of, random_seed
from hf_chts.topology.softness import temperature

# Layers that are evolved at the same time in one process; each takes several copies of itself in memory
_WORKERS = 4
# Weights that are evolved together where operations are launched: about as many as one layer of a 7B model has
_TOGETHER = 1 << 25
_T = TypeVar("_T")
_R = TypeVar("_R")


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

    def evolve(self, names: Sequence[str], weights: Mapping[str, Tensor]) -> dict[str, LayerEvolution]:
        """Evolve layers, all those of one shape together.

        Args:
            names: with each layer, those that are coupled to it.
            weights: (out, in) by name, 0 off the mask unless the config `trains_missing`; read only.
        """
        # junctions may include layers that do not train; those keep all their links
        junctions = [junction for junction in self.junctions if set(junction.layers) & set(names)]
        met = [name for junction in junctions for name in junction.layers if name in self.masks]
        masks = {name: self.masks[name] for name in (*names, *met)}
        pieces = {name: self._pieces(name, masks[name]) for name in names}
        if self._part("regrowth").kind == "selection":
            return {name: joined([self._select(p, weights[name]) for p in pieces[name]]) for name in names}
        stacks = [_Stack(same) for same in _by_shape([piece for name in names for piece in pieces[name]])]
        done: list[tuple[_Stack, Removal, Tensor, Tensor]] = []
        if not junctions:
            for stack in stacks:
                matrices = stack.of(weights)
                halves = self._remove(stack, matrices)
                done.append((stack, halves, *self._regrow(stack, matrices, halves)))
        else:
            first = [(stack, self._remove(stack, stack.of(weights))) for stack in stacks]
            kept = _layers([(stack, halves.kept) for stack, halves in first])
            fixed = {name: masks[name] for name in met if name not in kept}
            kept = percolate(kept | fixed, junctions, fixed)
            for stack, halves in first:
                after = stack.of(kept)
                halves = replace(halves, kept=after, left=counts_of(after).tolist())
                done.append((stack, halves, *self._regrow(stack, stack.of(weights), halves)))
        # what the host is to know comes once
        returned = torch.cat([back for *_, back in done]).tolist()
        parts: dict[str, list[LayerEvolution]] = {name: [] for name in names}
        for stack, halves, new, _ in done:
            for n, piece in enumerate(stack.pieces):
                before, stayed, left = halves.before[n], halves.stayed[n], halves.left[n]
                back = returned.pop(0)
                parts[piece.layer].append(
                    LayerEvolution(new[n], before - stayed, stayed - left, piece.links - left, back)
                )
        return {name: joined(of_layer) for name, of_layer in parts.items()}

    def _pieces(self, name: str, mask: Tensor) -> "list[_Piece]":
        n = self.blocks.get(name, 1)
        rows = [slice(len(mask) * i // n, len(mask) * (i + 1) // n) for i in range(n)]
        return [_Piece(name, rows[i], mask[rows[i]], block_links(self.links[name], i, n), i) for i in range(n)]

    def _select(self, piece: "_Piece", weight: Tensor) -> LayerEvolution:
        part = self._part("regrowth")
        whole = {"grad": self.gradients, "stored": self.stored}
        given: dict[str, Any] = {"mask": piece.mask, "weight": weight[piece.rows]}
        given |= {name: tensors[piece.layer][piece.rows] for name, tensors in whole.items() if name in part.needs}
        given["neurons"] = neuron_dimension(piece.layer)
        generator = generator_of(self._seed("pruning", piece), piece.mask.device)
        given["choose"] = highest(self.plan.config.links_pattern, piece.links, generator)
        chosen = part(self.plan.config, **given, links=piece.links, generator=generator)
        return selected(piece.mask, part.check(chosen, tuple(piece.mask.shape), piece.links))

    def _remove(self, stack: "_Stack", weights: Tensor) -> Removal:
        config, plan = self.plan.config, self.plan
        of_layer = [self.softness.get(piece.layer) for piece in stack.pieces]
        temperatures = [plan.temperature(self.step) if one is None else temperature(one) for one in of_layer]
        pattern = config.links_pattern
        remove = evolution.remove if pattern is None else partial(patterned_evolution.remove, pattern=pattern)
        return remove(
            weights,
            stack.masks,
            links=[piece.links for piece in stack.pieces],
            drop_fraction=plan.drop_fraction(self.step),
            removal=Choice(
                partial(self._score, "removal", stack),
                config.removal_choice == "soft",
                temperatures,
                by_link=self._part("removal").by_link,
            ),
            pruning=Choice(partial(self._score, "pruning", stack), by_link=self._part("pruning").by_link),
            seeds=partial(self._seeds, stack),
        )

    def _regrow(self, stack: "_Stack", weights: Tensor, halves: Removal) -> tuple[Tensor, Tensor]:
        part, pattern = self._part("regrowth"), self.plan.config.links_pattern
        regrow = evolution.regrow if pattern is None else partial(patterned_evolution.regrow, pattern=pattern)

        def score(kept: Tensor) -> Tensor:
            return self._score("regrowth", stack, weights.where(kept, 0) if "weight" in part.needs else None, kept)

        def sample(masks: Tensor, k: Sequence[int], seeds: Sequence[int]) -> Tensor:
            assert part.sampler is not None
            drawn = [
                part.sampler(mask, n, generator=generator_of(seed, mask.device))
                for mask, n, seed in zip(masks, k, seeds, strict=True)
            ]
            return torch.stack(drawn)

        sampler = part.stack_sampler or (sample if part.sampler is not None else None)
        return regrow(
            halves,
            links=[piece.links for piece in stack.pieces],
            regrowth=Choice(score, self.plan.config.regrowth_choice == "soft", sampler=sampler),
            seeds=partial(self._seeds, stack),
        )

    def _part(self, field: str) -> Part:
        parts = REGROWTH if field == "regrowth" else REMOVAL
        return parts[getattr(self.plan.config, field)]

    def _score(
        self, field: str, stack: "_Stack", weights: Tensor | None, masks: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """The scores of a stack, (layers, out, in), or of the links at `positions` in it, (links,)."""
        part, config = self._part(field), self.plan.config
        whole = {"grad": self.gradients, "stored": self.stored}
        given = {"mask": masks, "weight": weights}
        given |= {name: stack.of(tensors) for name, tensors in whole.items() if name in part.needs}
        if positions is not None:
            values = {
                name: tensor.reshape(-1)[positions]
                for name, tensor in given.items()
                if tensor is not None and name in part.needs and name != "mask"
            }
            values["mask"] = torch.ones_like(positions, dtype=torch.bool)
            return part.check(part(config, **values), tuple(positions.shape))
        if part.stacks:
            return part.check(part(config, **given), tuple(masks.shape))
        scores = []
        for n in range(len(masks)):
            one = {name: None if tensor is None else tensor[n] for name, tensor in given.items()}
            scores.append(part.check(part(config, **one), tuple(masks.shape[1:])))
        return scores[0][None] if len(scores) == 1 else torch.stack(scores)

    def _seeds(self, stack: "_Stack", purpose: str) -> list[int]:
        return [self._seed(purpose, piece) for piece in stack.pieces]

    def _seed(self, purpose: str, piece: "_Piece") -> int:
        layer = self._numbers[piece.layer]
        number = self.plan.number_of_updates(self.step)
        if piece.block:
            purpose = f"{purpose} {piece.block}"
        return random_seed(self.plan.config.topology_seed, number, layer, purpose)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.masks)}


@dataclass(frozen=True)
class _Piece:
    """Rows of a layer that evolve independently: all of them, or those of one attention head."""

    layer: str
    rows: slice
    mask: Tensor  # of these rows, before the update
    links: int
    block: int


class _Stack:
    """Pieces of one shape."""

    def __init__(self, pieces: Sequence[_Piece]) -> None:
        self.pieces = pieces
        self.masks = stacked([piece.mask for piece in pieces])

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(pieces, rows, in) of matrices (out, in) by layer name; a view of a single one."""
        return stacked([tensors[piece.layer][piece.rows] for piece in self.pieces])


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one; a view of a single one."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _by_shape(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    same: dict[torch.Size, list[_Piece]] = {}
    for piece in pieces:
        same.setdefault(piece.mask.shape, []).append(piece)
    return list(same.values())


def _layers(stacks: Sequence[tuple[_Stack, Tensor]]) -> dict[str, Tensor]:
    """Matrices (out, in) by layer name, of stacks of pieces."""
    parts: dict[str, dict[int, Tensor]] = {}
    for stack, tensors in stacks:
        for piece, tensor in zip(stack.pieces, tensors, strict=True):
            parts.setdefault(piece.layer, {})[piece.block] = tensor
    return {name: _cat([blocks[n] for n in sorted(blocks)]) for name, blocks in parts.items()}


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def in_threads(evolve: Callable[[_T], _R], batches: Sequence[_T], device: torch.device) -> Iterator[_R]:
    """Call `evolve` on every batch, in order; on a CPU, on several at the same time.

    An update is many small operations, which gain little from several threads each. The results are the same, since
    every layer has its own random numbers.
    """
    threads = torch.get_num_threads()
    workers = min(threads, _WORKERS, len(batches))
    if workers <= 1 or device.type != "cpu":
        yield from map(evolve, batches)
        return
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            yield from pool.map(evolve, batches)
    finally:
        torch.set_num_threads(threads)  # MKL's number of threads is global


def in_batches(
    groups: Iterable[Sequence[str]], shapes: Mapping[str, tuple[int, ...]], device: torch.device
) -> list[list[str]]:
    """The layers of `groups` in batches that one call evolves: on a CPU a group each; elsewhere groups of like shapes
    together, as long as they have no more weights than the largest group, or `_TOGETHER`."""
    if device.type == "cpu":
        return [list(group) for group in groups]
    ordered = sorted(groups, key=lambda group: [shapes[name] for name in group])
    sizes = [sum(prod(shapes[name]) for name in group) for group in ordered]
    room = max([_TOGETHER, *sizes])
    batches: list[list[str]] = []
    filled = room
    for group, size in zip(ordered, sizes, strict=True):
        if filled + size > room:
            batches.append([])
            filled = 0
        batches[-1] += group
        filled += size
    return batches


def update_cost(shape: tuple[int, int], config: SparsityConfig) -> float:
    """Roughly how many operations an update of a layer of `shape` (out, in) takes, to share layers out over ranks."""
    part = REGROWTH[config.regrowth]
    # a sampler draws from the whole layer
    drawn = config.regrowth_choice == "soft" and part.sampler is not None and config.links_pattern is None
    return (part.sampler_cost if drawn else part.cost)(*shape)

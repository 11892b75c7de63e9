"""A topology update of a whole model: each rank evolves its share of the layers, and all ranks get the new masks."""

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise, zip_longest
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from hf_chts.evolution.held_tensors import read_by_update
from hf_chts.evolution.regrown_adam import RegrownAdam
from hf_chts.evolution.update import TopologyUpdate, in_batches, in_threads, stacked, update_cost
from hf_chts.evolution.update_figures import LayerUpdate, counts_after, overall_figures
from hf_chts.files.reading import LazyMapping
from hf_chts.finite import not_finite
from hf_chts.layers.shares import layer_links, without_return
from hf_chts.layers.sparse_layers import SparseLayers
from hf_chts.layers.stored_weights import StoredWeights
from hf_chts.names import listed
from hf_chts.schedule_plan import SchedulePlan
from hf_chts.sharding.gradients import DenseGradient
from hf_chts.sharding.interface import Engine
from hf_chts.sharding.ranks import exchange, rank_and_world, share_out
from hf_chts.topology.bits import link_positions, pack_stack, unpack_stack
from hf_chts.topology.percolation import Junction, anp_rate, coupled_groups
from hf_chts.topology.softness import adapted, chance_overlap


class NotFinite(FloatingPointError):
    """An update would read NaN or infinity.

    Attributes:
        names: the names of the tensors that hold it.
    """

    def __init__(self, step: int, names: list[str]) -> None:
        super().__init__(
            f"after step {step} these hold NaN or infinity, so the topology is not updated by them: {listed(names)}. "
            "Go on from an earlier checkpoint, and lower the learning rate, lengthen the warm-up or clip gradients"
        )
        self.names = names


class UpdateOverRanks:
    """Updates the topology of a model over all ranks.

    Args:
        sparse: the handle of the model.
        engine: the engine that holds its weights and optimizer moments.
        junctions: how layers are coupled, for percolation; none without it.

    Attributes:
        owner: the rank that evolves a layer, by its name.
    """

    def __init__(self, sparse: SparseLayers, engine: Engine, junctions: Sequence[Junction]) -> None:
        self.sparse = sparse
        self.engine = engine
        self.junctions = junctions
        names = list(sparse.layers)
        self.groups = coupled_groups(junctions, names)
        costs = {
            group[0]: sum(update_cost(sparse.layers[name].storage.shape, sparse.config) for name in group)
            for group in self.groups
        }
        dealt = share_out(costs, rank_and_world()[1])
        self.owner = {name: dealt[group[0]] for group in self.groups for name in group}

    @torch.no_grad()
    def update(
        self,
        plan: SchedulePlan,
        step: int,
        names: Collection[str],
        *,
        stored: Mapping[str, StoredWeights],
        softness: dict[str, float],
        explored: Mapping[str, Tensor],
        adam: RegrownAdam | None,
    ) -> tuple[dict[str, Any], dict[str, LayerUpdate]]:
        """Evolve the layers `names` as of `step`. Collective.

        Args:
            stored: the weights of removed links, if they are kept; updated.
            softness: δ by layer name; updated.
            explored: bits of the links that were ever active; updated.
            adam: corrects the steps of regrown links; None for no correction.

        Returns:
            (the figures of all layers together, the counts of each layer).

        Raises:
            NotFinite: something that the update reads is NaN or infinite, on any rank; nothing was changed.
            ValueError: a layer would get more links than it has room for; nothing was changed.
        """
        start = time.perf_counter()
        layers, config = self.sparse.layers, self.sparse.config
        device = next(iter(layers.values())).storage.device
        if bad := not_finite(read_by_update(layers, self.engine, stored), device=device):
            raise NotFinite(step, bad)
        number = plan.number_of_updates(step)
        links = self._links(plan, step, names, stored)
        self._check_room(step, {name: links[name] for name in names})
        counted = {name: [0] * 4 for name in layers}
        after: dict[str, Tensor] = {}
        for groups in self._rounds(names):
            for done in self._evolve(plan, step, groups, links, stored, softness):
                for batch in self._alike(done):
                    bits = stacked([done[name][0] for name in batch])
                    masks = unpack_stack(bits, layers[batch[0]].storage.shape)
                    for name, mask, change in zip(batch, masks, self._changes(batch, masks), strict=True):
                        stamp = (adam.born[name], number) if adam else None
                        layers[name].storage.replace(mask, self.engine, stored.get(name), stamp, change)
                        if adam:
                            adam.changed(name)
                        explored[name].bitwise_or_(done[name][0])
                        _, removed, regrown, returned = counted[name] = done[name][1]
                        if config.adapts_softness and regrown:
                            chance = chance_overlap(removed, regrown, mask.numel() - links[name])
                            softness[name] = adapted(softness[name], returned / regrown, chance, config.softness_end)
                    after |= self._after(batch, masks, explored)
        masks_now = self.sparse.topologies()
        for batch in self._alike([name for name in layers if name not in after]):
            after |= self._after(batch, stacked([masks_now[name] for name in batch]), explored)
        counts = torch.stack([after[name] for name in layers]).tolist()  # the host waits once
        result = {
            name: LayerUpdate(
                links=now, removed=pruned + removed, regrown=regrown, returned=returned, active=active, explored=ever
            )
            for (name, (pruned, removed, regrown, returned)), (now, active, ever) in zip(
                counted.items(), counts, strict=True
            )
        }
        figures: dict[str, Any] = overall_figures(result, {name: layer.storage.shape for name, layer in layers.items()})
        if config.percolation:
            figures["active_neurons_percolated"] = anp_rate(masks_now, self.junctions)
        if config.adapts_softness:
            figures["softness"] = fmean(softness[name] for name in names)
        figures["topology_seconds"] = round(time.perf_counter() - start, 4)
        return figures, result

    def _alike(self, names: Iterable[str]) -> list[list[str]]:
        """Batches of layers of one shape."""
        shapes = {name: layer.storage.shape for name, layer in self.sparse.layers.items()}
        same: dict[tuple[int, int], list[str]] = {}
        for name in names:
            same.setdefault(shapes[name], []).append(name)
        device = next(iter(self.sparse.layers.values())).storage.device
        return [batch for of_shape in same.values() for batch in in_batches([[n] for n in of_shape], shapes, device)]

    def _changes(self, names: Sequence[str], masks: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The links that go and those that come, by layer: positions in (out, in), int64 (links,), ascending."""
        old = stacked([self.sparse.layers[name].topology for name in names])
        numel = masks[0].numel()
        both = [link_positions(old & ~masks), link_positions(masks & ~old)]
        if len(names) == 1:
            return [(both[0], both[1])]
        edges = torch.arange(len(names) + 1, device=masks.device) * numel
        ends = torch.stack([torch.searchsorted(positions, edges) for positions in both]).tolist()
        parts = [
            [within[start:stop] for start, stop in pairwise(edge)]
            for within, edge in zip((positions % numel for positions in both), ends, strict=True)
        ]
        return list(zip(*parts, strict=True))

    def _after(self, names: Sequence[str], masks: Tensor, explored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        counts = counts_after(masks, stacked([explored[name] for name in names]))
        return dict(zip(names, counts, strict=True))

    def _check_room(self, step: int, links: Mapping[str, int]) -> None:
        """Raises ValueError, naming the layer, if a layer has room for fewer links than these, by name."""
        for name, number in links.items():
            room = self.sparse.layers[name].storage.room
            if number > room:
                raise ValueError(
                    f"the update after step {step} would give {name} {number} links, and it has {room} slots: as many "
                    "as the ends of the schedule ask for, or 1.5 times that with allocation 'global'. Nothing was "
                    "changed: resume from the last checkpoint with storage: masked, which has room for any number"
                )

    def _rounds(self, names: Collection[str]) -> list[list[list[str]]]:
        """The groups of coupled layers among `names` that are evolved in each round.

        If weights have to be gathered, each rank evolves one group in a round, so that it holds no more at a time.
        """
        groups = [[name for name in group if name in names] for group in self.groups]
        groups = [group for group in groups if group]
        if not self.engine.sharded:
            return [groups]
        by_rank: dict[int, list[list[str]]] = {}
        for group in groups:
            by_rank.setdefault(self.owner[group[0]], []).append(group)
        rounds = zip_longest(*(by_rank[rank] for rank in sorted(by_rank)))
        return [[group for group in together if group is not None] for together in rounds]

    def _evolve(
        self,
        plan: SchedulePlan,
        step: int,
        groups: Sequence[list[str]],
        links: Mapping[str, int],
        stored: Mapping[str, StoredWeights],
        softness: Mapping[str, float],
    ) -> Iterator[dict[str, tuple[Tensor, list[int]]]]:
        """The new masks as bits, and (pruned, removed, regrown, returned) links, of the layers of `groups`."""
        engine, layers, masks, config = self.engine, self.sparse.layers, self.sparse.topologies(), self.sparse.config
        rank, _ = rank_and_world()
        names = [name for group in groups for name in group]
        destinations = [(layers[name], self.owner[name]) for name in names]
        weights = self._matrices(names, engine.gather(destinations))
        kept: Mapping[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        if stored:
            brought = {name: stored[name].bring(engine, self.owner[name]) for name in names}
            made = {name: make for name, make in brought.items() if make is not None}
            kept = LazyMapping(lambda name: made[name](), made)
        if config.needs_gradient:
            means = {name: self._take_gradient(name) for name in names}
            gradients = {name: layers[name].matrix(mean) for name, mean in means.items() if mean is not None}
        update = TopologyUpdate(
            plan=plan,
            step=step,
            masks=masks,
            links=links,
            gradients=gradients,
            stored=kept,
            junctions=self.junctions,
            blocks=self.sparse.blocks,
            softness=softness if config.adapts_softness else {},
        )

        def evolve(batch: list[str]) -> dict[str, tuple[Tensor, list[int]]]:
            done = update.evolve(batch, {name: weights[name] for name in batch})
            # as bits until they are needed, since bools of all layers would take as much memory as the masks
            bits = {
                name: row
                for same in self._alike(batch)
                for name, row in zip(same, pack_stack(stacked([done[name].mask for name in same])), strict=True)
            }
            return {
                name: (bits[name], [one.pruned, one.removed, one.regrown, one.returned]) for name, one in done.items()
            }

        device = next(iter(layers.values())).storage.device
        shapes = {name: layers[name].storage.shape for name in names}
        batches = in_batches([group for group in groups if self.owner[group[0]] == rank], shapes, device)
        mine: dict[str, tuple[Tensor, list[int]]] = {}
        for results in in_threads(evolve, batches, device):
            mine |= results
        return exchange(mine, shapes, self.owner, device)

    def _matrices(self, names: Sequence[str], tensors: Sequence[Tensor | None]) -> Mapping[str, Tensor]:
        """Matrices (out, in) by name, of values in the parameter's shape; made on access."""
        layers = self.sparse.layers
        here = {name: tensor.detach() for name, tensor in zip(names, tensors, strict=True) if tensor is not None}
        return LazyMapping(lambda name: layers[name].storage.matrix(here[name]), here)

    def _take_gradient(self, name: str) -> Tensor | None:
        layer = self.sparse.layers[name]
        gradient, layer.dense_gradient = layer.dense_gradient, None
        if not isinstance(gradient, DenseGradient):
            raise RuntimeError(
                f"no dense gradient of {name} was kept for this update: call evolver.step() after every optimizer "
                "step, and leave it to that to update"
            )
        return gradient.mean()

    def _links(
        self, plan: SchedulePlan, step: int, trained: Collection[str], stored: Mapping[str, StoredWeights]
    ) -> dict[str, int]:
        """The number of links of each layer after an update at `step`, if all of them evolved.

        So a layer's number does not depend on which others are frozen, and their links are not shared out. But while
        sparsity rises, or waits for its schedule to catch up, the layers that train get no links back.
        """
        config, layers = plan.config, self.sparse.layers
        shapes = {name: layer.storage.shape for name, layer in layers.items()}

        def whole(name: str) -> Tensor:
            layer = layers[name]
            weight = layer.storage.matrix(self.engine.whole(layer))
            if name in stored and config.selects:
                weight = torch.where(layer.topology, weight, stored[name].matrix(self.engine))
            return weight

        weights = LazyMapping(whole, layers)
        links = layer_links(shapes, plan.sparsity(step), config, weights, self.sparse.blocks)
        rises = step <= plan.decay_end and config.initial_sparsity <= config.sparsity
        if config.allocation == "global" and rises and len(trained) < len(layers):
            held = {name: layer.links for name, layer in layers.items()}
            links = without_return(links, held, shapes, config, weights, trained, self.sparse.blocks)
        return links

"""Evolver: evolves the topology of a sparse model inside any training loop."""

import hashlib
import logging
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from hf_chts.checkpoint import TopologyState, verify_fits
from hf_chts.config import SparsityConfig
from hf_chts.evolution.compute_choice import alone, settle_compute
from hf_chts.evolution.first_step import check_first_step
from hf_chts.evolution.half_precision import refuse_half_precision
from hf_chts.evolution.regrown_adam import RegrownAdam
from hf_chts.evolution.update_figures import LayerUpdate
from hf_chts.evolution.update_ranks import UpdateOverRanks
from hf_chts.evolution.update_warmup import add_density_factor, add_update_warmup, warmup_steps
from hf_chts.layers.block_weights import make_together
from hf_chts.layers.coupling import couplings
from hf_chts.layers.links import check_zeros
from hf_chts.layers.other_weights import keep_largest, other_weights
from hf_chts.layers.plain_weight import check_places, check_plain
from hf_chts.layers.shares import layer_links, sparsity_ahead
from hf_chts.layers.slots import SlotStorage
from hf_chts.layers.sparse_layers import SparseLayers
from hf_chts.layers.stored_weights import StoredWeights
from hf_chts.names import listed
from hf_chts.schedule_plan import SchedulePlan
from hf_chts.sharding.detect import engine_of
from hf_chts.sharding.interface import Engine
from hf_chts.sharding.ranks import rank_and_world, together
from hf_chts.topology.bits import pack_bits, unpack_bits
from hf_chts.topology.percolation import Junction

_log = logging.getLogger(__name__)
_FORMAT = "hf_chts evolver, 1"
# the active evolver of each model
_AT_WORK: "weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[Evolver]]" = weakref.WeakKeyDictionary()


class Evolver:
    """Evolves a sparse model after the optimizer steps that the config's schedules name.

    `SparsityHandle.evolver(optimizer, max_steps)` makes one for a loop of your own:

        evolver = sparse.evolver(optimizer, max_steps=10_000)
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            figures = evolver.step()

    Its hooks on the optimizer keep missing links at 0 and count the optimizer's steps, so that `step` does nothing on
    micro-batches and on steps that a GradScaler skips. Under DDP, FSDP2 and DeepSpeed all ranks call it alike.

    Attributes:
        sparse: the handle of the model.
        plan: when the topology is updated, and how.
        engine: what holds weights and optimizer moments.
        finished: finished optimizer steps.
        trained: the layers that trained, by name, as the run began.
        reached: the sparsity that the schedule, or its floor, had at the last update; None: not known.
        history: the figures of each update so far, in order.
        explored: the links of each layer that were ever active, bit-packed uint8 by layer name.
        stored: the weights of removed links, by layer name, where they are kept.
        softness: δ of each layer's next removal, by layer name; used where it adapts.
        compute: with compute: auto, the largest number of links with which a layer multiplies with them alone.
        last_update: what the last update did to each layer; empty before it.
    """

    compute: dict[str, int]

    def __init__(self, sparse: SparseLayers) -> None:
        self.sparse = sparse
        self.plan: SchedulePlan | None = None
        self.engine: Engine | None = None
        self.finished = 0
        self.last_update: dict[str, LayerUpdate] = {}
        self.trained: list[str] = []
        self.reached: float | None = None
        self.adam: RegrownAdam | None = None
        self._ranks: UpdateOverRanks | None = None
        self._restored: TopologyState | None = None
        self._first_step = False  # whether none has been taken since training began
        self._hooks: list[Any] = []
        self._say: Callable[[str], None] = _log.info
        self._alone = 0  # layers that multiply with their links alone, as was last said
        self._hooked = False  # whether the optimizer tells when it steps
        self._others: list[Tensor] = []  # weights outside sparse layers that are to be sparse
        self._stepped: set[int] = set()  # what the optimizer has stepped on since the last call of `step`
        self._reset()

    @property
    def config(self) -> SparsityConfig:
        return self.sparse.config

    @property
    def owner(self) -> dict[str, int]:
        """The rank that evolves each layer, by layer name; from `begin` on."""
        return self._ranks.owner if self._ranks else {}

    def begin(
        self,
        max_steps: int,
        optimizer: Any,
        step: int = 0,
        *,
        tokens: int = 1024,
        dtype: torch.dtype | None = None,
        say: Callable[[str], None] = _log.info,
    ) -> None:
        """Attach to an optimizer, for a run of `max_steps` optimizer steps of which `step` are finished. Collective.

        Args:
            optimizer: torch's, Accelerate's or DeepSpeed's, as prepared for the run.
            tokens: in each forward pass, for the measurement of compute: auto.
            dtype: of autocast, if the run uses it; likewise.
            say: called on rank 0 with a line about what was measured.

        Raises:
            ValueError: the engine, the optimizer or a layer's weight is one with which topologies cannot evolve, the
                schedules do not fit into the run, ranks differ, or another evolver is at work on the model.
            RuntimeError: a weight or a moment is not 0 where there is no link.
        """
        layers = self.sparse.layers
        other = _AT_WORK.get(self.sparse.model, lambda: None)()
        if other is not None and other is not self:
            raise ValueError("another evolver is at work on this model: call its close() first")
        self._compare_ranks(max_steps)
        check_places(self.sparse.model, layers)
        for name, layer in layers.items():
            check_plain(name, layer)
            layer.mask_by_hook()  # load_state_dict(assign=True) puts another tensor in the weight's place
        engine = engine_of(self.sparse.model, layers, optimizer)
        self._refuse_copies()
        if self.config.ages_links:
            RegrownAdam.check(optimizer)
        trains_missing = self.config.trains_missing
        if trains_missing:
            self._take_others(engine)
        self.prepare(max_steps, engine, step)
        if self._restored is None and not trains_missing:
            self.forget_missing()  # the optimizer may have stepped on other masks: those of an earlier run
        self.check()
        self._attach(optimizer)
        for layer in layers.values():
            layer.storage.trains_missing = trains_missing
        devices = {layer.storage.device.type for layer in layers.values()}
        if self.config.storage == "links" and not engine.sharded and "cpu" not in devices:
            self._hooks += make_together(self.sparse.model)
        if self.config.compute == "auto":
            assert self.plan is not None
            self.compute = settle_compute(self.sparse, self.plan, self.compute, tokens, dtype, say)
        self._say, self._alone = say, alone(self.sparse)
        self.finished, self._first_step = step, True
        self._ask_gradients()

    def prepare(self, max_steps: int, engine: Engine, step: int = 0) -> None:
        """The part of `begin` that makes the plan, on an engine, without hooks on the optimizer.

        Raises:
            ValueError: the schedules do not fit into the run, percolation is not known for the model, or the optimizer
                steps on float16 weights.
        """
        layers = self.sparse.layers
        refuse_half_precision(
            {name: engine.held(layer)["weight"] for name, layer in layers.items() if engine.optimizes(layer)}
        )
        self._reset()
        self.engine, self.finished = engine, step
        self.trained = engine.trained(layers)
        self.plan = self.plan_from(step, max_steps, self.trained)
        if self._restored is None:
            self.reached = self.plan.sparsity(step)
        names = list(layers)
        junctions: list[Junction] = []
        if self.config.percolation:
            junctions = couplings(cast(PreTrainedModel, self.sparse.model), names)
        self._ranks = UpdateOverRanks(self.sparse, engine, junctions)
        self.take_parts()

    def step(self, finished: int | None = None) -> dict[str, Any]:
        """Call after each optimizer step, before the next forward: evolves when an update is due. Collective.

        Args:
            finished: finished optimizer steps, for a loop that counts them itself, skipped ones included; None: this
                evolver counts the steps that its optimizer takes.

        Returns:
            The figures of the update, all layers together (`sparsity`, `itop`, `links_removed`, …); empty if none was
            due.

        Raises:
            NotFinite: the update would read NaN or infinity; nothing was changed.
            RuntimeError: a weight is not 0 where there is no link after the first step.
        """
        if self.plan is None:
            raise RuntimeError("this evolver is attached to no optimizer: make it with sparse.evolver(optimizer, …)")
        if finished is None:
            if self._hooked and not self._stepped:
                return {}
            finished = self.finished + 1
        self._stepped.clear()
        if self._first_step or not self._hooked:
            self._after_optimizer_step()
        self.finished = finished
        figures = self.update(finished) if self.plan.is_update(finished) else {}
        if self.config.trains_missing:
            figures |= self._still_missing(updated=bool(figures))
        self._ask_gradients()
        return figures

    def update(self, step: int) -> dict[str, Any]:
        """Evolve every layer that trains once, as of `step`, whether one is due or not. Collective.

        Returns:
            The figures of all layers together; empty if no layer trains.
        """
        assert self.plan is not None
        assert self._ranks is not None
        names = self._trained()
        if not names:
            return {}
        figures, self.last_update = self._ranks.update(
            self.plan,
            step,
            names,
            stored=self.stored,
            softness=self.softness,
            explored=self.explored,
            adam=self.adam,
        )
        self.reached = self.plan.sparsity(step)
        if self.plan.is_told(step) or not self.plan.is_update(step):
            self.history.append({"step": step, **figures})
        if (now := alone(self.sparse)) != self._alone:
            self._alone = now
            if rank_and_world()[0] == 0:
                self._say(f"compute: {now} of {len(self.sparse.layers)} layers multiply with their links alone now")
        if self.config.compact_after_decay and step >= self.plan.decay_end:
            self._compact()
        return figures

    def warm_up(self, scheduler: Any, steps: int | None = None) -> int:
        """Have the learning rate climb back after each update, in a torch scheduler that is a function of the step.

        Args:
            scheduler: a `LambdaLR`, as all of transformers' `get_scheduler` are; changed in place.
            steps: the length of the warm-up; None takes the paper's 20, or a fifth of update_interval if that is less,
                and 0 where regrown links have a warm-up of their own (`regrown_warmup`).

        Returns:
            The number of steps.

        Raises:
            ValueError: the scheduler is not a `LambdaLR`, or `steps` does not fit between two updates.
        """
        assert self.plan is not None
        scheduler = _function_of_step(scheduler, "a warm-up after updates")
        by_link = self.config.regrown_warmup > 0
        steps = warmup_steps(steps, self.plan.interval, by_link=by_link) if self.config.evolves else 0
        if steps:
            add_update_warmup(scheduler, self.plan, steps)
        return steps

    def scale_rate(self, scheduler: Any) -> None:
        """Multiply the learning rate as `rate_by_density` says, in a scheduler as `warm_up` takes it, in place.

        Raises:
            ValueError: the scheduler is not a `LambdaLR`.
        """
        assert self.plan is not None
        if self.config.rate_by_density != "none":
            add_density_factor(_function_of_step(scheduler, "a learning rate by density"), self.plan)

    def check(self) -> None:
        """Raises RuntimeError, naming layer and tensor, if anything on this rank is not 0 where there is no link.

        Where missing links train, that concerns the weights alone.
        """
        check_zeros(self.sparse.layers, None if self.config.trains_missing else self.engine)

    def close(self) -> None:
        """Remove the hooks from the optimizer. Another evolver may then take the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._hooked = [], False
        self._stepped.clear()
        for layer in self.sparse.layers.values():
            layer.dense_gradient, layer.storage.trains_missing = None, False
        if _AT_WORK.get(self.sparse.model, lambda: None)() is self:
            del _AT_WORK[self.sparse.model]

    # What a run keeps

    def state(self, step: int | None = None) -> TopologyState:
        """What a checkpoint keeps beyond weights and optimizer. Collective.

        `stored`, `left` and `born` are on rank 0 alone if the engine splits weights.
        """
        stored = self._saved_weights()
        slots = {name: layer.storage.slot_positions for name, layer in self.sparse.layers.items()}
        return TopologyState(
            masks=self.sparse.topologies(),
            shapes={name: layer.storage.shape for name, layer in self.sparse.layers.items()},
            explored=self.explored,
            stored={name: saved["stored"] for name, saved in stored.items()},
            left={name: saved["left"] for name, saved in stored.items() if "left" in saved},
            slots={name: positions for name, positions in slots.items() if positions is not None},
            step=self.finished if step is None else step,
            history=self.history,
            born=self._saved_births(),
            softness=self.softness if self.config.adapts_softness else {},
            sparsity=self.reached,
            compute=self.compute,
        )

    def state_dict(self) -> dict[str, Any]:
        """`state` as plain values and CPU tensors, for `torch.save` on rank 0. Collective."""
        state = self.state()
        return {
            "format": _FORMAT,
            "config": self.config.to_dict(),
            "max_steps": self.plan.max_steps if self.plan else 0,
            "step": state.step,
            "masks": {name: (pack_bits(mask).cpu(), list(mask.shape)) for name, mask in state.masks.items()},
            "explored": {name: bits.cpu().clone() for name, bits in state.explored.items()},
            **{
                kind: {name: values.cpu().clone() for name, values in getattr(state, kind).items()}
                for kind in ("stored", "born", "left", "slots")
            },
            "softness": dict(state.softness),
            "history": list(state.history),
            "sparsity": state.sparsity,
            "compute": dict(state.compute),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Load weights and optimizer yourself, before or after. Collective.

        Raises:
            ValueError: the state is of another sparsity config or model; nothing was changed.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(f"this is no state of an evolver (format {state.get('format')!r}, not {_FORMAT!r})")
        check_same_config(SparsityConfig.from_dict(dict(state["config"])), self.config, "the evolver's state")
        restored = TopologyState(
            masks={name: unpack_bits(bits, tuple(shape)) for name, (bits, shape) in state["masks"].items()},
            **{key: state[key] for key in ("explored", "stored", "step", "history", "born", "softness", "sparsity")},
            **{key: state.get(key, {}) for key in ("left", "slots", "compute")},
        )
        verify_fits(restored, self.sparse.layers, "the evolver's state")
        measured = self.compute if self.engine is not None else {}
        self.restore(restored)
        if self.engine is not None:
            assert self.plan is not None
            self.prepare(self.plan.max_steps, self.engine, restored.step)
            self._restored, self._first_step = None, True
            if self.config.compute == "auto":  # as it was measured in the run that goes on
                self.compute = self.compute or measured
                for name, limit in self.compute.items():
                    self.sparse.layers[name].storage.multiply_links(up_to=limit)  # type: ignore[attr-defined]
            self._stepped.clear()
            self._ask_gradients()

    def restore(self, state: TopologyState | None) -> None:
        """Set the masks of a checkpoint now, and make the next `begin` continue from its state.

        None cancels an earlier call.
        """
        self._restored = state
        if state is not None:
            self._reset()

    def take_parts(self) -> None:
        """Set up this rank's stored weights and births, from the restored checkpoint or anew.

        Raises:
            ValueError: the run has more updates than births can count.
        """
        assert self.engine is not None
        assert self.plan is not None
        state, layers = self._restored, self.sparse.layers
        if self.config.ages_links:
            self.adam = RegrownAdam(
                layers,
                self.engine,
                self.plan.interval,
                restart=self.config.regrown_adam == "per_weight_steps",
                warmup=self.config.link_warmup(self.plan.max_steps),
            )
            self.adam.check_updates(self.plan.number_of_updates(self.plan.max_steps))
        for name, layer in layers.items():
            if self.config.stores_weights and self.engine.optimizes(layer):
                self.stored[name] = layer.storage.stored_weights(self.engine, state.stored_of(name) if state else None)
            if self.adam and state and name in state.born:
                self.adam.restore(name, layer.storage.loaded(state.born[name], state.slots.get(name)))

    def forget_missing(self) -> None:
        """Set the optimizer's state to 0 where there is no link, since it may have stepped on other masks.

        The weights of the forward do not change.
        """
        assert self.engine is not None
        for layer in self.sparse.layers.values():
            names = {*self.engine.held(layer), *self.engine.copies(layer)}
            layer.storage.clear(self.engine, skip=["working" if "working" in names else "weight"])

    @torch.no_grad()
    def move_moments(self, before: Mapping[str, Tensor]) -> None:
        """Move the optimizer's moments to where their links are now, and give other links 0.

        Args:
            before: the position of the link in each slot to which the moments belong, (slots,) by layer name. Where the
                engine splits them, all become 0.
        """
        assert self.engine is not None
        for name, old in before.items():
            layer = self.sparse.layers[name]
            new = layer.storage.slot_positions
            assert new is not None
            if new.equal(old):
                continue
            order = old.argsort()
            places = torch.searchsorted(old[order], new).clamp_(max=len(old) - 1)
            same = old[order][places] == new
            for kind, tensor in self.engine.held(layer).items():
                if kind in ("weight", "working", "gradient"):
                    continue
                if self.engine.sharded:
                    tensor.zero_()
                else:
                    tensor.copy_(tensor[order[places]].where(same, 0))

    def plan_from(self, step: int, max_steps: int, trained: Collection[str] | None = None) -> SchedulePlan:
        """The plan of a run of `max_steps` optimizer steps that starts, or continues, after `step` of them.

        If the model is sparser than its schedule says, because it comes from a run with another one, sparsity stays the
        same until the schedule has caught up.

        Args:
            trained: the layers that train; None takes all that are not frozen.
        """
        config, layers = self.config, self.sparse.layers
        shapes = {name: layer.storage.shape for name, layer in layers.items()}

        def largest_block(sparsity: float) -> list[int]:
            # not called with global allocation, which would read the weights
            links = layer_links(shapes, sparsity, config, {})
            return [-(-number // self.sparse.blocks.get(name, 1)) for name, number in links.items()]

        plan = config.plan(max_steps, links=largest_block)
        if not plan.decay_end or config.initial_sparsity > config.sparsity:
            return plan
        update = plan.number_of_updates(step) * plan.interval
        scheduled, ahead = plan.sparsity(update), self.reached
        if self._restored is None or ahead is None:
            if trained is None:
                trained = [name for name, layer in layers.items() if layer.parameter.requires_grad]
            links = {name: layer.links for name, layer in layers.items()}
            ahead = sparsity_ahead(links, shapes, config, scheduled, trained)
        if ahead is None or ahead <= scheduled + 1e-12:
            return plan
        return config.plan(max_steps, floor=min(ahead, config.sparsity), links=largest_block)

    def _reset(self) -> None:
        """Set up the state of a run, from the restored checkpoint or anew."""
        state, layers = self._restored, self.sparse.layers
        for name, layer in layers.items():
            layer.dense_gradient = None
            if state:
                layer.storage.restore(state.masks[name], state.slots.get(name))
        self.history: list[dict[str, Any]] = list(state.history) if state else []
        self.compute = dict(state.compute) if state else {}
        self.softness = dict.fromkeys(layers, self.config.softness_start) | (state.softness if state else {})
        # as bits: bools would take as much memory as the masks
        self.explored = {
            # copied, since a file's tensors may be the file itself
            name: state.explored[name].to(layer.storage.device, copy=True) if state else pack_bits(layer.topology)
            for name, layer in layers.items()
        }
        self.stored: dict[str, StoredWeights] = {}
        self.adam = None
        self.reached = state.sparsity if state else None
        self._ranks = None
        self._said: set[str] = set()  # the layers that were logged as not training

    def _saved_births(self) -> dict[str, Tensor]:
        """`RegrownAdam.born` of every layer, whole; on rank 0."""
        whole = {}
        for name, part in (self.adam.born if self.adam else {}).items():
            assert self.engine is not None, "there are parts from `begin` on"
            layer = self.sparse.layers[name]
            (tensor,) = self.engine.gather([(layer, 0)], [part])
            if tensor is not None:
                whole[name] = layer.storage.saved(tensor.cpu() if self.engine.sharded else tensor)
        return whole

    def _saved_weights(self) -> dict[str, dict[str, Tensor]]:
        """The weights of removed links of every layer, by name and kind; on rank 0."""
        saved = {}
        for name, stored in self.stored.items():
            assert self.engine is not None, "there are parts from `begin` on"
            of_layer = stored.saved(self.engine)
            if of_layer:
                saved[name] = {kind: value.cpu() if self.engine.sharded else value for kind, value in of_layer.items()}
        if saved:  # the file has an entry for every layer, also for those that the optimizer does not have
            like = next(iter(saved.values()))["stored"]
            for name, layer in self.sparse.layers.items():
                saved.setdefault(name, layer.storage.nothing_stored(like))
        return saved

    # The optimizer

    def _attach(self, optimizer: Any) -> None:
        self.close()
        _AT_WORK[self.sparse.model] = weakref.ref(self)
        inner, split = optimizer, False
        while type(inner).__module__.startswith(("accelerate.", "deepspeed.runtime.")) and hasattr(inner, "optimizer"):
            split |= type(inner).__module__.startswith("deepspeed.")
            inner = inner.optimizer
        if not isinstance(inner, torch.optim.Optimizer):
            return
        self._hooked = True
        # a weak reference, so that the optimizer does not keep the evolver and the model alive
        me = weakref.ref(self)

        def before(optimizer: Any, *_: Any) -> None:
            if (evolver := me()) is not None:
                evolver._before_optimizer_step(_stepped_on(optimizer))

        def after(optimizer: Any, *_: Any) -> None:
            if (evolver := me()) is not None:
                evolver._stepped.add(_stepped_on(optimizer))
                if evolver.adam:
                    evolver.adam.correct(evolver.finished + 1)
                if not split:  # DeepSpeed steps on its own copies of the weights, one group after the other
                    evolver._after_optimizer_step()

        self._hooks = [inner.register_step_pre_hook(before), inner.register_step_post_hook(after)]

    def _before_optimizer_step(self, stepped_on: int) -> None:
        if stepped_on in self._stepped:
            raise RuntimeError(
                f"evolver.step() was not called after optimizer step {self.finished + 1}: call it after each "
                "optimizer.step(), or evolver.close() if the topology is not to evolve any more"
            )

    @torch.no_grad()
    def _after_optimizer_step(self) -> None:
        assert self.engine is not None
        layers = self.sparse.layers
        if self.config.trains_missing:  # `step` comes to it, after an update that reads what missing links have become
            return
        if self.engine.moves_missing_links:
            for layer in layers.values():
                layer.storage.clear(self.engine, skip=["gradient"])
        if self._first_step:
            self._first_step = False
            check_first_step(self.engine, layers)

    def _take_others(self, engine: Engine) -> None:
        """Take the weights outside sparse layers that are to be sparse, where missing links are to train.

        Raises:
            ValueError: the engine splits weights, or there are none of the other weights that are to be sparse.
        """
        if engine.sharded:
            raise ValueError(
                f"regrowth {self.config.regrowth!r} lets the optimizer move missing links and chooses among all "
                "weights after each step, which is known for weights that are whole on each rank, and here the engine "
                "splits them or their moments: train in one process or with DDP (configs/accelerate/ddp.yaml), or "
                "choose another method"
            )
        self._others = other_weights(self.sparse.model, self.config.also_sparse or [])

    def _still_missing(self, *, updated: bool) -> dict[str, float]:
        """Set missing links to 0 after a step that moved them, and other weights that are to be sparse likewise.

        Args:
            updated: whether an update has done so, with the layers that train.

        Returns:
            A figure of the other weights, where an update has figures as well.
        """
        assert self.engine is not None
        assert self.plan is not None
        if not updated:
            for layer in self.sparse.layers.values():
                layer.storage.clear(self.engine)
        if self._first_step:
            self._first_step = False
            check_first_step(self.engine, self.sparse.layers)
        if not self._others:
            return {}
        kept, total = keep_largest(self._others, self.plan.sparsity(self.plan.latest_update(self.finished)))
        return {"other_sparsity": 1 - kept / total} if updated else {}

    def _ask_gradients(self) -> None:
        """Keep dense gradients in the next step, if the update after it needs them."""
        assert self.plan is not None
        assert self.engine is not None
        assert self._ranks is not None
        if self.config.needs_gradient and self.plan.is_update(self.finished + 1):
            for name, layer in self.sparse.layers.items():
                layer.dense_gradient = self.engine.dense_gradient(layer, self._ranks.owner[name])

    def _compact(self) -> None:
        """Shrink parameters to the slots that still have a link."""
        assert self.engine is not None
        storages = {
            name: layer.storage for name, layer in self.sparse.layers.items() if isinstance(layer.storage, SlotStorage)
        }
        vacant = {name: storage for name, storage in storages.items() if storage.vacant}
        if not vacant:
            return
        if not self.engine.resizes:
            if "compact_after_decay" not in self._said and rank_and_world()[0] == 0:
                _log.warning("compact_after_decay: slots are given back in one process alone, and stay in this run")
            self._said.add("compact_after_decay")
            return
        before = sum(storage.room for storage in storages.values())
        for name, storage in vacant.items():
            kept = storage.compact(self.engine)
            if self.adam:
                self.adam.keep(name, kept)
        after = sum(storage.room for storage in storages.values())
        _log.info("compact_after_decay: %d of %d slots are given back", before - after, before)

    # What is refused

    def _trained(self) -> list[str]:
        """The layers that train at the moment, the same on all ranks. Collective.

        The others do not evolve, since their new links would stay 0. Each is logged once.
        """
        assert self.engine is not None
        layers = self.sparse.layers
        for name, layer in layers.items():
            check_plain(name, layer)
        names = self.engine.trained(layers)
        still = [name for name in layers if name not in names]
        for name in still:
            layers[name].dense_gradient = None
        if not self._said.issuperset(still) and rank_and_world()[0] == 0:
            new = [name for name in still if name not in self._said]
            follows = (
                "so their topology does not evolve: their sparsity stays as it is, and that of all layers together may "
                "differ from the schedule's"
                if names
                else "so nothing evolves until one of them trains"
            )
            _log.warning("These sparse layers are frozen or not in the optimizer, %s: %s", follows, listed(new))
        self._said.update(still)
        return names

    def _refuse_copies(self) -> None:
        """Raises ValueError that names copies of sparse layers which would train without evolving."""
        copies = [name for name, layer in self.sparse.copies().items() if layer.parameter.requires_grad]
        if copies and self.config.evolves:
            raise ValueError(
                f"copies of sparse layers would train instead of the layers themselves, and their topology would not "
                f"evolve: {listed(copies)}. Leave them out of PEFT's modules_to_save and train the layers without "
                "adapters, or use method static"
            )

    def _compare_ranks(self, max_steps: int) -> None:
        """Raises ValueError if ranks differ in the length of the run or in their masks. Collective."""
        if rank_and_world()[1] == 1:
            return
        digest = hashlib.sha256()
        for name, mask in sorted(self.sparse.topologies().items()):
            digest.update(name.encode() + pack_bits(mask).cpu().numpy().tobytes())
        together({"the number of steps": str(max_steps), "the topology at the begin": digest.hexdigest()[:16]})


def check_same_config(saved: SparsityConfig, current: SparsityConfig, where: str) -> None:
    """Raises ValueError that names the fields in which `saved`, read from `where`, differs from this run's config."""
    if saved != current:
        pairs = [(f.name, getattr(saved, f.name), getattr(current, f.name)) for f in fields(current) if f.compare]
        changed = "; ".join(f"{name}: {was!r} there, {now!r} here" for name, was, now in pairs if was != now)
        raise ValueError(
            f"{where} was written with another sparsity config ({changed}): resume with that config, or start a new "
            "run from its weights"
        )


def _function_of_step(scheduler: Any, what: str) -> LambdaLR:
    scheduler = getattr(scheduler, "scheduler", scheduler)  # Accelerate's
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"{what} needs a LambdaLR scheduler, got {type(scheduler).__name__}: make one with "
            "transformers.get_scheduler, or leave it out"
        )
    return scheduler


def _stepped_on(optimizer: torch.optim.Optimizer) -> int:
    """An id that distinguishes the steps DeepSpeed takes: its optimizer steps on each group of weights separately."""
    return next((id(weight) for group in optimizer.param_groups for weight in group["params"]), 0)

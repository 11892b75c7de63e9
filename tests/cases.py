"""The table of sparse methods and variants that is run through every invariant, and what such runs have in common."""

from tiny import random_blocks, tiny_llama
from transformers import TrainerCallback

from hf_chts import SparseTrainer, SparseTrainingArguments, SparsityConfig
from hf_chts.methods import METHODS
from hf_chts.topology.allocation import links_at

STEPS, INTERVAL = 24, 4

# A method joins by its row in METHODS; a variant by a row here
CASES = {name: {"method": name} for name in METHODS if name not in ("dense", "static")} | {
    "chts, adaptive softness": {"method": "chts", "softness_schedule": "adaptive", "drop_fraction": 0.3},
    "chtss, per-weight Adam steps": {"method": "chtss", "regrown_adam": "per_weight_steps"},
    "smet, regrowth by gradient": {"method": "smet", "regrowth": "gradient", "regrown_warmup": 3},
    "chtss, warm-up of regrown links": {"method": "chtss", "regrown_warmup": 6, "rate_by_density": "inverse_sqrt"},
    "granet, from a quarter of the run": {"method": "granet", "sparsity_schedule_from": 0.25},
    "chts, per head": {"method": "chts", "per_head": True, "sparsity": 0.8},
    "rigl, historical weights": {"method": "rigl", "regrown_weights": "historical"},
    "gmp, global allocation": {"method": "gmp", "allocation": "global"},
    "granet, global allocation": {"method": "granet", "allocation": "global"},
    "set, Erdos-Renyi allocation": {"method": "set", "allocation": "erdos_renyi"},
    "mest, layers with their own sparsity": {"method": "mest", "layer_sparsity": {"down_proj": 0.8, "q_proj": 0.95}},
    "set, percolation": {"method": "set", "percolation": True, "sparsity": 0.97, "drop_fraction": 0.3},
    "set, as in its own paper": {"method": "set", "recipe": "original"},
    "rigl, fan-in": {"method": "rigl", "pattern": "fan_in"},
    "chtss, fan-in": {"method": "chtss", "pattern": "fan_in"},
    "gmp, fan-in": {"method": "gmp", "pattern": "fan_in", "allocation": "global"},
    "chts, fan-in per head": {"method": "chts", "pattern": "fan_in", "per_head": True},
    "chts, 1:5 in attention": {"method": "chts", "pattern": "1:5", "target_modules": ["q_proj", "k_proj", "o_proj"]},
    "rigl, 2:4": {"method": "rigl", "pattern": "2:4"},
    "rigl, from the largest weights": {"method": "rigl", "initial_topology": "magnitude"},
    "chtss, from the most important weights": {"method": "chtss", "initial_topology": "relative_importance"},
    "topk, other weights and rate by density": {
        "method": "topk",
        "also_sparse": ["embeddings", "norms"],
        "rate_by_density": "inverse_sqrt",
        "neuron_links": 2,
    },
    "chts, regrowth by gradient": {"method": "chts", "regrowth": "gradient", "removal": "relative_importance"},
}

# methods whose missing links train keep links in masks alone, whole on each rank
IN_SLOTS = [name for name, fields in CASES.items() if not SparsityConfig(**fields).trains_missing]

# without the rows that another row contains, as "rigl, historical weights" contains "rigl"
VARIED = [name for name, fields in CASES.items() if not any(fields.items() < more.items() for more in CASES.values())]


def case_config(case="chtss", **changes):
    """The config of a case; any config of a row that has a `method`."""
    fields = CASES.get(case, {"method": case})
    return SparsityConfig(**({"update_interval": INTERVAL} | fields | changes))


def arguments(directory, kind=SparseTrainingArguments, **changes):
    settings = {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_steps": 10,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
    }
    if issubclass(kind, SparseTrainingArguments):
        settings["update_warmup_steps"] = 2
    return kind(**(settings | changes))


def trainer(directory, case="chtss", callbacks=None, model=None, storage="masked", config=None, **changes):
    return SparseTrainer(
        model=tiny_llama() if model is None else model,
        args=arguments(directory, **changes),
        sparsity=case_config(case, **({"storage": storage} | (config or {}))),
        train_dataset=random_blocks(),
        eval_dataset=random_blocks(8),
        callbacks=callbacks,
    )


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def same_weights(first, second):
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def all_of(run):
    """Everything that a run has come to: what it logged but for times and means over one session, and all its state."""
    topology, times = run.evolver, ("topology_seconds",)
    log = [{k: v for k, v in entry.items() if k not in times} for entry in run.state.log_history]
    found = {
        "log": [entry for entry in log if "train_runtime" not in entry],
        "history": [{k: v for k, v in entry.items() if k not in times} for entry in topology.history],
        "softness": dict(topology.softness),
    }
    tensors = {"weights": weights(run), "masks": run.sparse.masks(), "explored": topology.explored}
    tensors |= {"stored": topology.state().stored, "born": topology.adam.born if topology.adam else {}}
    for kind, named in tensors.items():
        found |= {f"{kind} {name}": tensor.clone() for name, tensor in named.items()}
    return found


def differences(first, second):
    """The names of what is not the same in two results of `all_of`."""
    assert first.keys() == second.keys()
    return [
        name
        for name, one in first.items()
        if not (one.equal(second[name]) if hasattr(one, "equal") else one == second[name])
    ]


def check_links(sparse, sparsity):
    """That every layer has exactly the links it must have where the run's sparsity is `sparsity`."""
    config = sparse.config
    own = config.overrides
    for name, layer in sparse.layers.items():
        final = own.get(name.rsplit(".", 1)[-1])
        if final is not None:
            assert layer.links == links_at(layer.topology.numel(), final * (sparsity / config.sparsity)), name
        elif config.allocation == "uniform":
            assert layer.links == links_at(layer.topology.numel(), sparsity), name
    if config.allocation != "uniform":
        possible = sum(layer.topology.numel() for layer in sparse.layers.values())
        assert sparse.links() == links_at(possible, sparsity)
    for name, layer in sparse.layers.items():
        check_pattern(config.pattern, layer.topology, name)
    for name, blocks in sparse.blocks.items():
        parts = [int(rows.sum()) for rows in sparse.layers[name].topology.chunk(blocks)]
        assert max(parts) - min(parts) <= 1, name


def check_pattern(pattern, mask, name=None):
    """That a mask (out, in) has a pattern of the config, by counting."""
    if pattern == "fan_in":
        rows = [sum(row) for row in mask.tolist()]
        assert max(rows) - min(rows) <= 1, name
    elif pattern != "none":
        kept, of = map(int, pattern.split(":"))
        groups = [row[i : i + of] for row in mask.tolist() for i in range(0, len(row), of)]
        assert {(sum(group), len(group)) for group in groups} == {(kept, of)}, name


def missing_are_zero(layer, values):
    """That values of the parameter's shape are 0 where there is no link, or in slots without one."""
    positions = layer.storage.slot_positions
    missing = ~layer.matrix(layer.topology) if positions is None else positions == layer.topology.numel()
    return bool(values[missing].eq(0).all())


class Stop(TrainerCallback):
    """Ends the run after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


class Invariants(TrainerCallback):
    """Looks at every layer where the gradient is clipped, after the optimizer step and after the update."""

    def __init__(self):
        self.trainer = None
        self.floor = 0.0
        self.before = {}
        self.updates = 0

    @classmethod
    def watch(cls, run, floor=0.0):
        """Added last, so that it comes after the callback that evolves the topology.

        `floor` is the sparsity that the model has where an earlier run took it beyond the schedule of this one.
        """
        invariants = cls()
        invariants.trainer, invariants.floor = run, floor
        run.add_callback(invariants)
        return invariants

    @property
    def trains_missing(self):
        """Whether gradients and moments of missing links are what training makes of them, and only weights are 0."""
        return self.trainer.sparse.config.trains_missing

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for layer in self.trainer.sparse.layers.values():
            gradient = layer.storage.matrix(layer.parameter.grad)
            assert gradient[layer.topology].ne(0).any()
            assert missing_are_zero(layer, layer.parameter if self.trains_missing else layer.parameter.grad)
            if self.trains_missing and not layer.topology.all():
                assert gradient[~layer.topology].ne(0).any()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if not self.trains_missing:  # else the step moves all weights, and the update that follows reads them
            self.zero_off_mask(optimizer)
        self.before = {name: mask.clone() for name, mask in self.trainer.sparse.masks().items()}

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.zero_off_mask(optimizer)
        sparse = self.trainer.sparse
        plan = sparse.config.plan(args.max_steps)
        changed = 0
        for name, mask in sparse.masks().items():
            fresh = mask & ~self.before[name]
            layer = sparse.layers[name]
            changed += int((mask != self.before[name]).sum())
            if self.trains_missing:
                self.largest_stay(layer, fresh)
                continue
            if sparse.config.regrown_weights == "zero":
                assert layer.matrix(layer.weight)[fresh].eq(0).all()
            for moment in ("exp_avg", "exp_avg_sq"):
                assert layer.storage.matrix(optimizer.state[layer.parameter][moment])[fresh].eq(0).all()
        scheduled = plan.sparsity(state.global_step - state.global_step % sparse.config.update_interval)
        check_links(sparse, max(scheduled, self.floor))
        assert (changed > 0) <= plan.is_update(state.global_step)
        self.updates += plan.is_update(state.global_step) and changed > 0

    def largest_stay(self, layer, fresh):
        """That links come with the weight of the step, and that each neuron keeps its share of them."""
        assert layer.matrix(layer.weight)[fresh].ne(0).all()
        name = next(name for name, one in self.trainer.sparse.layers.items() if one is layer)
        along = 0 if name.endswith(("o_proj", "down_proj")) else 1
        degrees = layer.topology.sum(along)
        least = min(self.trainer.sparse.config.neuron_links, layer.links // len(degrees))
        assert degrees.min() >= least > 0

    def zero_off_mask(self, optimizer):
        for layer in self.trainer.sparse.layers.values():
            moments = optimizer.state[layer.parameter]
            if self.trains_missing:
                assert missing_are_zero(layer, layer.parameter)
                if not layer.topology.all():
                    assert not missing_are_zero(layer, moments["exp_avg"])
                continue
            for tensor in (layer.parameter, moments["exp_avg"], moments["exp_avg_sq"]):
                assert missing_are_zero(layer, tensor)

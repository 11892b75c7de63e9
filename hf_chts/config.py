"""SparsityConfig: the settings of a sparse run, saved as sparsity_config.json beside the weights."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_chts.config_checks import check_types, check_values, unknown
from hf_chts.config_file import read
from hf_chts.methods import CHOICES, METHODS
from hf_chts.schedule_plan import SchedulePlan
from hf_chts.topology.parts import (
    INITIAL_TOPOLOGIES,
    REGROWTH,
    REMOVAL,
    SPARSITY_SCHEDULES,
    Part,
    import_parts,
    modules_of,
)
from hf_chts.topology.patterns import NONE, Pattern, pattern_of

CONFIG_NAME = "sparsity_config.json"
# In a file beside the fields: the sparsity that the model has, where it differs from the one that was asked for
_MEASURED = "measured_sparsity"
VERSION = 1
# Names modules of parts to import, separated by commas, for commands that read configs and have no --parts
PARTS_VARIABLE = "HF_CHTS_PARTS"
# Fields that decide where defaults come from, so that no method can set them
_NOT_OF_METHODS = ("method", "recipe", "parts", "storage", "compute", "dense_mib", "compact_after_decay", "version")


def _option(default: Any, help: str, *, shown: str | None = None, compare: bool = True) -> Any:
    """A field that is None until `__post_init__` fills it in: from the run's method if that sets it, else `default`."""
    text = f"{help} Default: {default if shown is None else shown}."
    return field(default=None, compare=compare, metadata={"help": text, "default": default})


def _by_method(default: Any, help: str) -> Any:
    """An `_option` that methods do set."""
    return _option(default, help, shown="the method's" + ("" if default is None else f", else {default}"))


def differs(measured: float, asked: float) -> bool:
    """Whether a model's sparsity differs from the one asked for by more than the rounding of links."""
    return abs(measured - asked) > 1e-3


@dataclass(frozen=True)
class SparsityConfig:
    """How a model is made sparse and how its topology evolves.

    A field that is not set, or None, gets the default of `method` and `recipe` (see `METHODS`), else its own. Fractions
    of the run are fractions of its optimizer steps.

    Raises:
        ValueError: a value is out of range, of the wrong type or not among the choices; the message names it and the
            remedy. Or a module in `parts` cannot be imported.
    """

    _argument_group_name = "sparsity"  # transformers.HfArgumentParser reads it

    method: str = _option("chtss", f"Sparse training method: {', '.join(METHODS)}.")
    recipe: str = _option(
        "paper",
        "Where defaults come from: paper, the settings that arXiv 2501.19107 compares all methods with; original, "
        f"those of the method's own paper ({', '.join(name for name, method in METHODS.items() if method.original)}). "
        "Fields that are set win over either.",
    )
    sparsity: float = _by_method(0.9, "Final share of missing links in every sparse layer, in (0, 1).")
    initial_sparsity: float = _by_method(
        None, "Sparsity at step 0 where the sparsity has a schedule; else it is `sparsity`."
    )
    target_modules: list[str] | None = _option(  # noqa: RUF009 - _option calls field()
        None,
        "Linear layers to make sparse: suffixes of module names (q_proj) or regular expressions that match whole "
        "names. None: the linear projections of the blocks (of the text model, if there are several), except routers, "
        "gates, adapters, the step sizes of state spaces, and layers with fewer than 16 inputs or outputs; embeddings "
        "and lm_head stay dense.",
    )
    exclude_modules: list[str] | None = _option(  # noqa: RUF009 - _option calls field()
        None, "Linear layers to leave dense among those, by patterns as in target_modules."
    )
    allocation: str = _by_method(
        "uniform",
        "How links are shared out among layers: uniform, the same sparsity in each; erdos_renyi, density in "
        "proportion to (out + in)/(out·in); global, by the largest weights of all layers, again at each update.",
    )
    layer_sparsity: dict[str, float] | str | None = _option(  # noqa: RUF009 - _option calls field()
        None,
        'Final sparsity of single layers, by patterns as in target_modules, as JSON: {"down_proj": 0.95}. It rises in '
        "step with that of the other layers, which share out `sparsity` among themselves.",
    )
    per_head: bool = _option(
        False, "Give each attention head's rows of q, k and v a topology of their own, with the same number of links."
    )
    pattern: str = _option(
        "none",
        "Numbers of links that every choice keeps to, at every update: fan_in, the same for each output, to within "
        "one; N:M such as 2:4, N of every M neighbouring inputs, with sparsity 1 − N/M throughout; none.",
    )
    initial_topology: str = _by_method(
        "erdos_renyi",
        f"Topology at step 0: {', '.join(CHOICES['initial_topology'])} (correlated, the paper's CSTI, needs "
        "calibration inputs; magnitude, relative_importance and wanda prune the weights that a model has, wanda by "
        "calibration inputs too).",
    )
    initial_weights: str = _option(
        "model",
        "Weights that the links of a new model start with: model, those that it has; swi (sparse weight "
        "initialization), normal with variance 2/(density·inputs), so that sparse ReLU layers pass on what they get; "
        "kaiming, normal with variance 2/inputs.",
    )
    brf_r: float = _option(0.1, "Spread of the bipartite receptive field: 0 takes the nearest inputs, 1 is uniform.")
    brf_degrees: str = _option("fixed", "Output degrees of the receptive field: fixed or uniform.")
    bsw_beta: float = _option(0.25, "Share of the bipartite small world's links that are rewired, in [0, 1].")
    bsf_equal_partition: bool = _option(False, "Give all inputs of the bipartite scale-free network one degree.")
    bsf_resort: bool = _option(False, "Order both sides of the bipartite scale-free network by degree.")
    removal: str = _by_method("magnitude", f"Score by which links are removed: {', '.join(CHOICES['removal'])}.")
    removal_choice: str = _by_method("hard", "hard keeps the highest scores; soft samples them by score^T.")
    softness_start: float = _option(
        0.5,
        "Softness δ of a soft removal at the first update, in [0, 1): T = δ/(1−δ), so a lower δ is softer. 0 removes "
        "links at random; towards 1 the strongest stay.",
    )
    softness_end: float = _option(
        0.9, "Softness δ of a soft removal at the last update, in [0, 1); the upper bound of adaptive softness."
    )
    softness_schedule: str = _option(
        "linear",
        "linear: δ goes from softness_start to softness_end over the updates. adaptive: each layer has its own δ; it "
        "falls (softer) while the layer regrows the links that it has just removed, and rises while it does not.",
    )
    regrowth: str = _by_method(
        "random",
        f"Score by which links are regrown: {', '.join(CHOICES['regrowth'])}. With stored (GMP) the links are the "
        "largest of all present and stored weights, and with largest (topk) those of all weights after each optimizer "
        "step, which moves missing links too; ζ does not count then.",
    )
    regrowth_choice: str = _by_method(
        "hard",
        "hard takes the highest scores; soft draws in proportion to the scores. A score in place of a "
        "method's random regrowth is hard.",
    )
    regrown_weights: str = _by_method(
        "zero",
        "Weight that a regrown link starts with: zero, or historical, the weight it had when it was removed (paper "
        "App. J).",
    )
    regrown_adam: str = _by_method(
        "global_steps",
        "Adam's bias correction of regrown links: global_steps, torch's own; per_weight_steps, counted for each link "
        "from the update that regrew it (takes two bytes a weight; torch's Adam and AdamW).",
    )
    regrown_warmup: float = _by_method(
        0.0,
        "Optimizer steps over which the steps of each regrown link grow to their full size; below 1, a fraction of "
        "update_interval (torch's Adam and AdamW). 0: none.",
    )
    rate_by_density: str = _by_method(
        "none",
        "Factor on the learning rate: none; inverse_sqrt, 1/√density, with the density that the sparse layers have at "
        "the time.",
    )
    pruning: str = _by_method(
        "magnitude", f"Score by which links are removed as sparsity rises: {', '.join(CHOICES['pruning'])}."
    )
    update_interval: float = _by_method(
        100,
        "Optimizer steps between topology updates (ΔT); below 1, a fraction of the run, so that 0.01 is every epoch of "
        "100.",
    )
    update_until: float = _by_method(0.75, "Fraction of the run after which the topology stays the same.")
    drop_fraction: float = _by_method(0.1, "Share of the links replaced at the first updates (ζ), in [0, 1].")
    drop_schedule: str = _by_method("cosine", "How ζ falls to 0 at `update_until`: constant, linear or cosine.")
    percolation: bool = _option(
        False,
        "Before regrowth, remove the links of neurons that coupled layers leave without input or output. Known for "
        "LLaMA-like blocks.",
    )
    sparsity_schedule: str = _by_method(
        "constant",
        f"How sparsity rises from initial_sparsity: {', '.join(CHOICES['sparsity_schedule'])}. elastic is MEST's EM&S: "
        "0.05 below the target, then 0.025.",
    )
    sparsity_schedule_from: float = _by_method(
        0.0, "Fraction of the run until which sparsity stays at initial_sparsity, before it rises."
    )
    sparsity_schedule_until: float = _option(
        None,
        "Fraction of the run at which `sparsity` is reached.",
        shown="update_until, and half of it for the sigmoid (same training FLOPs, paper App. I) and topk",
    )
    sigmoid_k: float = _option(6.0, "Steepness of the sigmoid schedule.")
    neuron_links: int = _by_method(
        0,
        "With regrowth largest: links that each neuron keeps, be they among the largest or not; where a layer has too "
        "few for that, an equal share of them. Neurons are a layer's outputs, or the inputs of layers that write to "
        "the residual stream (o_proj, down_proj, …).",
    )
    also_sparse: list[str] | None = _option(  # noqa: RUF009 - _option calls field()
        None,
        "With regrowth largest: other weights of which only the largest stay, each tensor at the sparsity of the run: "
        "embeddings (of tokens, and lm_head), biases, norms. They are not counted among the links.",
    )
    activation_topk: float = _option(
        1.0,
        "Share of the activations, in (0, 1], that stay in each block of a LLaMA-like model: those of the largest "
        "magnitude (AbsTopK) after norms and q, k, v, between the MLP's layers, and before the residual stream. The "
        "paper of topk has 0.25. Exports of such a model are packed.",
    )
    topology_seed: int = _option(0, "Seed of everything random in the topology.")
    storage: str = _option(
        "masked",
        "How the weights of sparse layers are kept: masked, dense with zeros; links, one value for each link, so that "
        "memory, traffic and checkpoints are in proportion to the links. The results are the same.",
        compare=False,
    )
    compute: str = _option(
        "dense",
        "With storage links, how layers multiply on a CPU: dense; sparse, with the links alone; auto, sparse where a "
        "measurement as training starts finds it faster.",
        compare=False,
    )
    dense_mib: int = _option(
        256,
        "With storage links, how many MiB of a layer's weight are made dense at a time; a larger weight is worked "
        "through in blocks of rows.",
        compare=False,
    )
    compact_after_decay: bool = _option(
        False,
        "With storage links, in one process: once the sparsity has reached its final value, give back the slots that "
        "the denser beginning needed.",
        compare=False,
    )
    parts: list[str] | None = _option(  # noqa: RUF009 - _option calls field()
        None,
        "Modules with parts or methods of your own (see hf_chts.register), by name or as .py files; they are imported "
        "first.",
        compare=False,
    )
    version: int = _option(VERSION, "Version of this config's format.")

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "also_sparse", "parts"):
            if isinstance(getattr(self, name), str):
                self._set(name, [getattr(self, name)])
        if isinstance(self.layer_sparsity, str):
            self._set("layer_sparsity", _mapping("layer_sparsity", self.layer_sparsity))
        check_types(self)
        self._whole_interval()
        if self.parts is not None:
            self._set("parts", import_parts(self.parts))
        self._set_defaults()
        if self.is_dense:
            # so that a recipe's sparsity can stay in the file when only the method is changed to dense
            self._set("sparsity", 0.0)
            self._set("initial_sparsity", 0.0)
        check_values(self)
        if modules := modules_of([METHODS[self.method], *self._parts()], named=self.parts or []):
            self._set("parts", modules)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _whole_interval(self) -> None:
        # files, equality and messages are to have 100, not 100.0
        if self.update_interval is not None and self.update_interval >= 1 and self.update_interval % 1 == 0:
            self._set("update_interval", int(self.update_interval))

    def _set_defaults(self) -> None:
        own = {item.name: item.metadata["default"] for item in dataclasses.fields(self)}
        if self.sparsity is None and self.pattern is not None and (pattern := pattern_of(self.pattern)) is not None:
            self._set("sparsity", pattern.sparsity)  # the only one that there is
        for name in ("method", "recipe"):
            if getattr(self, name) is None:
                self._set(name, own[name])
        if self.recipe == "comparison":  # its name in files of 0.1.0
            self._set("recipe", "paper")
        if self.method not in METHODS:
            raise ValueError(unknown("method", self.method, METHODS))
        method = METHODS[self.method]
        if self.recipe == "original" and method.original is None:
            known = ", ".join(name for name, other in METHODS.items() if other.original is not None)
            raise ValueError(
                f"recipe is 'original', but only {known} have the settings of their own papers, and method is "
                f"{self.method!r}: leave recipe out, and set the fields that are to differ"
            )
        original = method.original if self.recipe == "original" else None
        settings = dict(method.settings) | dict(original or {})
        if self.regrowth not in (None, "random") and settings.get("regrowth", own["regrowth"]) == "random":
            # among random scores soft is the same choice, and cheaper; among others it would be another method
            settings.pop("regrowth_choice", None)
        for name in settings:
            if name not in own or name in _NOT_OF_METHODS:
                raise ValueError(f"method {self.method!r} sets {name!r}, which is not a field that a method can set")
        for name, value in (own | settings).items():
            if getattr(self, name) is None:
                self._set(name, value)
        check_types(self)
        self._whole_interval()
        if self.sparsity_schedule not in SPARSITY_SCHEDULES:
            raise ValueError(unknown("sparsity_schedule", self.sparsity_schedule, SPARSITY_SCHEDULES))
        schedule = SPARSITY_SCHEDULES[self.sparsity_schedule]
        if self.initial_sparsity is None:
            self._set("initial_sparsity", self.sparsity - (schedule.starts_below or 0.0))
        if self.sparsity_schedule_until is None:
            self._set("sparsity_schedule_until", schedule.until * self.update_until)

    @property
    def is_dense(self) -> bool:
        """Whether the method is registered with sparsity 0, as "dense" is: no layer becomes sparse."""
        return METHODS[self.method].settings.get("sparsity") == 0

    @property
    def needs_gradient(self) -> bool:
        """Whether updates use the dense gradient of their step."""
        return self.evolves and any("grad" in part.needs for part in self.scores())

    @property
    def selects(self) -> bool:
        """Whether updates choose all links anew, in place of removal and regrowth."""
        return REGROWTH[self.regrowth].kind == "selection"

    @property
    def changes_sparsity(self) -> bool:
        """Whether sparsity has a schedule; else it is the same at every step."""
        return SPARSITY_SCHEDULES[self.sparsity_schedule].starts_below != 0

    @property
    def trains_missing(self) -> bool:
        """Whether optimizer steps move missing links too, which are 0 again before the next forward."""
        return self.evolves and REGROWTH[self.regrowth].trains_missing

    def scores(self) -> list[Part]:
        """The parts that updates use."""
        if self.selects:
            return [REGROWTH[self.regrowth]]
        return [REGROWTH[self.regrowth], REMOVAL[self.removal], REMOVAL[self.pruning]]

    def _parts(self) -> list[Part]:
        """All registered parts that the fields name."""
        return [choices[getattr(self, name)] for name, choices in CHOICES.items() if isinstance(choices, dict)]

    @property
    def links_pattern(self) -> Pattern | None:
        """The pattern that choices of links are put under; None without one."""
        return pattern_of(self.pattern)

    @property
    def stores_weights(self) -> bool:
        """Whether the weights of removed links are kept."""
        return self.evolves and self.regrown_weights == "historical"

    @property
    def overrides(self) -> dict[str, float]:
        """`layer_sparsity` as a dict: final sparsity by pattern."""
        assert not isinstance(self.layer_sparsity, str), "__post_init__ reads JSON"
        return self.layer_sparsity or {}

    @property
    def starts_from_weights(self) -> bool:
        """Whether the first links depend on the weights that the model has: which ones, or how many in each layer."""
        part = INITIAL_TOPOLOGIES[self.initial_topology]
        return not self.is_dense and (self.allocation == "global" or "weight" in part.needs)

    @property
    def adapts_softness(self) -> bool:
        """Whether each layer has its own softness of removal."""
        return self.evolves and self.softness_schedule == "adaptive"

    @property
    def ages_links(self) -> bool:
        """Whether the update that regrew each link is kept."""
        return self.evolves and (self.regrown_adam == "per_weight_steps" or self.regrown_warmup > 0)

    @property
    def evolves(self) -> bool:
        """Whether the topology changes during training."""
        return self.update_until > 0

    def interval(self, max_steps: int) -> int:
        """`update_interval` in optimizer steps, at least 1, in a run of `max_steps`."""
        given = self.update_interval
        return int(given) if given >= 1 else max(1, round(given * max_steps))

    def link_warmup(self, max_steps: int) -> int:
        """`regrown_warmup` in optimizer steps, in a run of `max_steps`."""
        given = self.regrown_warmup
        return round(given if given >= 1 else given * self.interval(max_steps))

    def plan(self, max_steps: int, **known: Any) -> SchedulePlan:
        """The schedules in steps, for a run of `max_steps` optimizer steps.

        Args:
            known: what is known of the model, as `SchedulePlan.of` takes it.

        Raises:
            ValueError: the schedules do not fit into the run.
        """
        return SchedulePlan.of(self, max_steps, **known)

    def to_dict(self) -> dict[str, Any]:
        """All fields, but those that earlier versions do not know only where they are not their defaults."""
        new: dict[str, Any] = {"parts": None, "storage": "masked", "compute": "dense", "dense_mib": 256}
        new |= {
            "initial_weights": "model",
            "regrown_warmup": 0.0,
            "rate_by_density": "none",
            "sparsity_schedule_from": 0.0,
            "neuron_links": 0,
            "also_sparse": None,
            "activation_topk": 1.0,
            "pattern": NONE,
        }
        method = METHODS[self.method]
        set_by_method = {*method.settings, *(method.original or ())}  # left out, it would be the method's when read
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in new or name in set_by_method or value != new[name]
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SparsityConfig":
        """The config with these fields, such as those of a file. It imports none of the modules in `parts`.

        Raises:
            ValueError: a field is unknown or bad, the version is newer than this package, or a part is not registered.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a sparsity config is a mapping of fields, got a {type(values).__name__}")
        version = values.get("version", VERSION)
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            raise ValueError(
                f"the sparsity config has version {version!r}, this hf_chts reads 1 to {VERSION}: upgrade hf_chts"
            )
        names = [item.name for item in dataclasses.fields(cls)]
        values = {name: value for name, value in values.items() if name != _MEASURED}
        for name in values:
            if name not in names:
                raise ValueError(unknown("field", name, names))
        parts = values.pop("parts", None)
        if parts is not None and not (isinstance(parts, list) and all(isinstance(name, str) for name in parts)):
            raise ValueError(f"parts is {parts!r}; it must be a list of module names")
        # Importing what a file names would let whoever wrote it choose code to run here
        if _unregistered(values) and (modules := os.environ.get(PARTS_VARIABLE)):
            import_parts(modules.split(","))
        if parts and (missing := _unregistered(values)):
            modules = ", ".join(parts)
            raise ValueError(
                f"{missing} is not registered: import {modules} first, or set "
                f"{PARTS_VARIABLE}={modules.replace(' ', '')} (in training also: --parts)"
            )
        config = cls(**values)
        if parts:
            config._set("parts", parts)
        return config

    def save(self, path: str | Path, *, measured: float | None = None) -> None:
        """Write JSON or YAML, by the file's suffix; a directory gets a sparsity_config.json.

        Args:
            measured: the sparsity of the model beside it, which is noted in the file if it differs from `sparsity`, as
                it does before the schedule has ended.
        """
        path = Path(path)
        if path.is_dir():
            path = path / CONFIG_NAME
        as_yaml = path.suffix in (".yaml", ".yml")
        values = self.to_dict()
        if measured is not None and not self.is_dense and differs(measured, self.sparsity):
            values[_MEASURED] = round(measured, 9)
        text = yaml.safe_dump(values, sort_keys=False) if as_yaml else json.dumps(values, indent=2) + "\n"
        path.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "SparsityConfig":
        """Read JSON or YAML, by the file's suffix; for a directory, its sparsity_config.json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a sparsity config; the message names the file.
        """
        path = Path(path)
        if path.is_dir():
            path = path / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no sparsity config at {path}: give a file or a directory that holds {CONFIG_NAME}"
            )
        values = read(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _unregistered(values: dict[str, Any]) -> str | None:
    """The first field whose value is the name of a part or method that is not registered, as "regrowth 'mine'"."""
    registries = {"method": METHODS} | {name: known for name, known in CHOICES.items() if isinstance(known, dict)}
    missing = (
        f"{field} {values[field]!r}"
        for field, known in registries.items()
        if values.get(field) is not None and str(values[field]) not in known
    )
    return next(missing, None)


def _mapping(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(
            f'{name} is {text!r}, which is not JSON: {error}; for example {{"down_proj": 0.95}}'
        ) from error

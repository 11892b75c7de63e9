"""SparsityConfig: the one source of truth about a sparse run, saved as sparsity_config.json beside the weights."""

import dataclasses
import difflib
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from hf_chts.config_file import read
from hf_chts.methods import CHOICES, DEFAULTS, METHODS
from hf_chts.schedule_plan import SchedulePlan
from hf_chts.topology.parts import REGROWTH, REMOVAL, SPARSITY_SCHEDULES, Part, foreign_modules, import_parts

CONFIG_NAME = "sparsity_config.json"
_MEASURED = "measured_sparsity"  # beside the fields in a file: what a model has, where that is not what was asked for
VERSION = 1


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": f"{help} Default: {default}."})


def _by_method(name: str, help: str) -> Any:
    otherwise = f", else {DEFAULTS[name]}" if DEFAULTS.get(name) is not None else ""
    return field(default=None, metadata={"help": f"{help} Default: the method's{otherwise}."})


def differs(measured: float, asked: float) -> bool:
    """Whether a model's sparsity is another than the one that was asked for, by more than layers round."""
    return abs(measured - asked) > 1e-3


@dataclass(frozen=True)
class SparsityConfig:
    """How a model is made sparse and how its topology evolves.

    Every field has a default that comes from `method` and `recipe` (see `METHODS`); any of them can be
    set to make a variant. Fields are checked when the config is made. Fractions of the run are fractions of the
    optimizer steps.

    Raises:
        ValueError: a value out of range, of the wrong type or not among the choices; the message names it and what
            to do.
    """

    _argument_group_name = "sparsity"  # transformers.HfArgumentParser reads it

    method: str = _option("chtss", f"Sparse training method: {', '.join(METHODS)}.")
    recipe: str = _option(
        "comparison",
        "Where defaults come from: comparison, the settings that arXiv 2501.19107 compares all methods with; original, "
        f"those of the method's own paper ({', '.join(name for name, method in METHODS.items() if method.original)}). "
        "Fields that are set win over either.",
    )
    sparsity: float = _by_method("sparsity", "Final share of missing links in every sparse layer, in (0, 1).")
    initial_sparsity: float = _by_method(
        "initial_sparsity", "Sparsity at step 0 where the sparsity has a schedule; else it is `sparsity`."
    )
    target_modules: list[str] | None = _option(  # noqa: RUF009 - _option calls field()
        None,
        "Linear layers to make sparse: suffixes of module names (q_proj) or regular expressions that match whole "
        "names. None: the linear projections of the blocks, of the text model where there are others, but for routers "
        "and gates, adapters, what sets the step of a state space, and layers with fewer than 16 inputs or outputs; "
        "embeddings and lm_head stay dense.",
    )
    exclude_modules: list[str] | None = _option(  # noqa: RUF009 - _option calls field()
        None, "Linear layers to leave dense among those, by patterns as in target_modules."
    )
    allocation: str = _by_method(
        "allocation",
        "How the links are shared out among layers: uniform, the same sparsity in each; erdos_renyi, density in "
        "proportion to (out + in)/(out·in); global, by the largest weights of all layers, anew at each update.",
    )
    layer_sparsity: dict[str, float] | str | None = _option(  # noqa: RUF009 - _option calls field()
        None,
        'Final sparsity of single layers, by patterns as in target_modules, as JSON: {"down_proj": 0.95}. Their '
        "sparsity rises in step with that of the others, among which `sparsity` is shared out.",
    )
    per_head: bool = _option(
        False, "Give each attention head's rows of q, k and v a topology of their own, with the same number of links."
    )
    initial_topology: str = _by_method(
        "initial_topology",
        f"Topology at step 0: {', '.join(CHOICES['initial_topology'])} (correlated needs calibration inputs).",
    )
    brf_r: float = _option(0.1, "Spread of the bipartite receptive field: 0 takes the nearest inputs, 1 is uniform.")
    brf_degrees: str = _option("fixed", "Output degrees of the receptive field: fixed or uniform.")
    bsw_beta: float = _option(0.25, "Share of the bipartite small world's links that are rewired, in [0, 1].")
    bsf_equal_partition: bool = _option(False, "Give all inputs of the bipartite scale-free network one degree.")
    bsf_resort: bool = _option(False, "Order both sides of the bipartite scale-free network by degree.")
    removal: str = _by_method("removal", f"Score by which links are removed: {', '.join(CHOICES['removal'])}.")
    removal_choice: str = _by_method("removal_choice", "hard keeps the highest scores; soft samples them by score^T.")
    softness_start: float = _option(0.5, "Softness δ of a soft removal at the first update, T = δ/(1−δ), in [0, 1).")
    softness_end: float = _option(
        0.9, "Softness δ of a soft removal at the last update, in [0, 1); the highest that adaptive softness takes."
    )
    softness_schedule: str = _option(
        "linear",
        "linear: δ goes from softness_start to softness_end over the updates. adaptive: each layer has a δ of its own, "
        "lower (softer) where the links that it regrows are those just removed, higher where none are.",
    )
    regrowth: str = _by_method(
        "regrowth",
        f"Score by which links are regrown: {', '.join(CHOICES['regrowth'])}. With stored (GMP) the largest weights "
        "are links, among those that are and those that were, and ζ has no part.",
    )
    regrowth_choice: str = _by_method("regrowth_choice", "hard takes the highest scores; soft samples by score.")
    regrown_weights: str = _by_method(
        "regrown_weights",
        "Weight that a regrown link starts with: zero, or historical: what it had when it was removed (paper App. J).",
    )
    regrown_adam: str = _option(
        "global_steps",
        "Adam's bias correction of regrown links: global_steps, torch's own; per_weight_steps, anew for each link from "
        "the update that regrew it (two bytes a weight; torch's Adam and AdamW).",
    )
    pruning: str = _by_method("pruning", "Score by which links are given up as sparsity rises.")
    update_interval: int = _option(100, "Optimizer steps between topology updates (ΔT).")
    update_until: float = _by_method("update_until", "Fraction of the run after which the topology stays.")
    drop_fraction: float = _by_method(
        "drop_fraction", "Share of the links replaced at the first updates (ζ), in [0, 1]."
    )
    drop_schedule: str = _by_method("drop_schedule", "How ζ falls to 0 at `update_until`: constant, linear or cosine.")
    percolation: bool = _option(
        False,
        "Before regrowth, remove the links of neurons that coupled layers leave without input or output. Known for "
        "LLaMA-like blocks.",
    )
    sparsity_schedule: str = _by_method(
        "sparsity_schedule",
        "How sparsity rises from initial_sparsity: constant, linear, cubic, sigmoid, or elastic (MEST's EM&S: 0.05 "
        "below the target, then 0.025).",
    )
    sparsity_schedule_until: float = _option(
        None,
        "Fraction of the run at which `sparsity` is reached. None: update_until, and half of it for the sigmoid "
        "(same training FLOPs, paper App. I).",
    )
    sigmoid_k: float = _option(6.0, "Steepness of the sigmoid schedule.")
    topology_seed: int = _option(0, "Seed of everything random in the topology.")
    parts: list[str] | None = _option(  # noqa: RUF009 - _option calls field()
        None,
        "Modules that register scores, topologies, schedules or methods of your own, by name or path; they are "
        "imported first.",
    )
    version: int = _option(VERSION, "Version of this config's format.")

    def __post_init__(self) -> None:
        if isinstance(self.parts, str):
            object.__setattr__(self, "parts", [self.parts])
        if self.parts is not None:
            object.__setattr__(self, "parts", import_parts(self.parts))
        if self.method not in METHODS:
            raise ValueError(_unknown("method", self.method, METHODS))
        method = METHODS[self.method]
        if self.recipe == "original" and method.original is None:
            known = ", ".join(name for name, other in METHODS.items() if other.original is not None)
            raise ValueError(
                f"recipe is 'original', but of the methods' own papers those of {known} are known, and method is "
                f"{self.method!r}: leave recipe out, and set the fields that are to differ"
            )
        original = method.original if self.recipe == "original" else None
        defaults = DEFAULTS | dict(method.settings) | dict(original or {})
        for item in dataclasses.fields(self):
            if getattr(self, item.name) is None:
                object.__setattr__(self, item.name, defaults.get(item.name))
        if self.is_dense:
            # so that a recipe's sparsity can stay in the file when only the method is changed to dense
            object.__setattr__(self, "sparsity", 0.0)
            object.__setattr__(self, "initial_sparsity", 0.0)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, [getattr(self, name)])
        if isinstance(self.layer_sparsity, str):
            object.__setattr__(self, "layer_sparsity", _mapping("layer_sparsity", self.layer_sparsity))
        if self.initial_sparsity is None:
            object.__setattr__(self, "initial_sparsity", self.sparsity - (self._schedule("starts_below") or 0.0))
        if self.sparsity_schedule_until is None:
            object.__setattr__(self, "sparsity_schedule_until", self._schedule("until", 1.0) * self.update_until)
        self._check()
        self._note_foreign_parts()

    @property
    def is_dense(self) -> bool:
        return self.method == "dense"

    @property
    def needs_gradient(self) -> bool:
        """Whether updates use the dense gradient of their step."""
        return self.evolves and any("grad" in part.needs for part in self._scores())

    @property
    def selects(self) -> bool:
        """Whether updates choose all links anew, in the place of removal and regrowth."""
        return REGROWTH[self.regrowth].kind == "selection"

    def _scores(self) -> list[Part]:
        """The parts that updates use."""
        if self.selects:
            return [REGROWTH[self.regrowth]]
        pruning = [REMOVAL[self.pruning]] if self.sparsity_schedule != "constant" else []
        return [REGROWTH[self.regrowth], REMOVAL[self.removal], *pruning]

    def _schedule(self, fact: str, otherwise: Any = None) -> Any:
        part = SPARSITY_SCHEDULES.get(self.sparsity_schedule)
        return part.facts[fact] if part else otherwise

    def _note_foreign_parts(self) -> None:
        """Name the modules of a user's parts that were registered without being named."""
        used = [
            parts[name]
            for field, parts in CHOICES.items()
            if isinstance(parts, dict) and (name := getattr(self, field)) in parts
        ]
        modules = [
            module for module in foreign_modules([METHODS[self.method], *used]) if module not in (self.parts or [])
        ]
        if modules:
            object.__setattr__(self, "parts", [*(self.parts or []), *dict.fromkeys(modules)])

    @property
    def stores_weights(self) -> bool:
        """Whether the weights of links that left are kept."""
        return self.evolves and self.regrown_weights == "historical"

    @property
    def overrides(self) -> dict[str, float]:
        """`layer_sparsity` as a dict: final sparsity by pattern."""
        assert not isinstance(self.layer_sparsity, str), "__post_init__ reads JSON"
        return self.layer_sparsity or {}

    @property
    def adapts_softness(self) -> bool:
        """Whether each layer finds its own softness of removal."""
        return self.evolves and self.softness_schedule == "adaptive"

    @property
    def ages_links(self) -> bool:
        """Whether it is kept when each link was regrown."""
        return self.evolves and self.regrown_adam == "per_weight_steps"

    @property
    def evolves(self) -> bool:
        """Whether the topology changes during training."""
        return self.update_until > 0

    def plan(self, max_steps: int, **known: Any) -> SchedulePlan:
        """The schedules in steps, for a run of `max_steps` optimizer steps.

        Args:
            known: what is known of the model, as `SchedulePlan.of` takes it.

        Raises:
            ValueError: the schedules do not fit into the run.
        """
        return SchedulePlan.of(self, max_steps, **known)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SparsityConfig":
        """Raises ValueError for unknown fields and for a version newer than this package."""
        if not isinstance(values, dict):
            raise ValueError(f"a sparsity config is a mapping of fields, got {type(values).__name__}")
        version = values.get("version", VERSION)
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            raise ValueError(
                f"the sparsity config has version {version!r}, this hf_chts reads 1 to {VERSION}: upgrade hf_chts"
            )
        names = [item.name for item in dataclasses.fields(cls)]
        values = {name: value for name, value in values.items() if name != _MEASURED}
        for name in values:
            if name not in names:
                raise ValueError(_unknown("field", name, names))
        # what a file names is not imported: that would run code which somebody else may have chosen
        if missing := [module for module in values.get("parts") or [] if module not in sys.modules]:
            raise ValueError(
                f"it needs parts that are registered by {', '.join(map(repr, missing))}: import that first, or name it "
                "with --parts"
            )
        return cls(**values)

    def save(self, path: str | Path, *, measured: float | None = None) -> None:
        """Write JSON or YAML, by the file's suffix; a directory gets a sparsity_config.json.

        Args:
            measured: the sparsity of the model beside it. Where it is another than the one that is asked for, as before
                the schedule has ended, the file says it too; it is no part of the config.
        """
        path = Path(path)
        if path.is_dir():
            path = path / CONFIG_NAME
        as_yaml = path.suffix in (".yaml", ".yml")
        values = {name: value for name, value in self.to_dict().items() if name != "parts" or value}
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

    def _check(self) -> None:
        self._check_types()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(_unknown(name, getattr(self, name), choices))
        if self.is_dense:
            return
        for name in ("sparsity", "initial_sparsity"):
            value = getattr(self, name)
            low = 0 if name == "initial_sparsity" else None
            if not (0 < value < 1 or value == low):
                raise ValueError(
                    f"{name} is {value}; it is a share of missing links strictly between 0 and 1 "
                    "(0.9 keeps 10% of the links). For a dense model use method: dense"
                )
        for name in ("brf_r", "bsw_beta", "drop_fraction", "update_until", "sparsity_schedule_until"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        for name in ("softness_start", "softness_end"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1): T = δ/(1−δ)")
        if self.update_interval < 1:
            raise ValueError(f"update_interval is {self.update_interval}; it must be at least 1 step")
        if self.sigmoid_k <= 0:
            raise ValueError(f"sigmoid_k is {self.sigmoid_k}; it must be > 0 (the paper's is 6)")
        if self.sparsity_schedule == "constant":
            if self.initial_sparsity != self.sparsity:
                raise ValueError(
                    f"initial_sparsity is {self.initial_sparsity} and sparsity {self.sparsity}, but sparsity_schedule "
                    "is 'constant': choose linear, cubic or sigmoid, or leave initial_sparsity out"
                )
        elif not self.evolves:
            raise ValueError(
                f"sparsity_schedule is {self.sparsity_schedule!r}, but method {self.method!r} never updates its "
                "topology: choose a method that does, or sparsity_schedule: constant"
            )
        elif self.sparsity_schedule_until > self.update_until:
            raise ValueError(
                f"sparsity_schedule_until is {self.sparsity_schedule_until} of the run, after the last topology update "
                f"at {self.update_until}: the target sparsity would never be reached. Lower it, or raise update_until"
            )
        elif (below := self._schedule("starts_below")) and self.initial_sparsity != self.sparsity - below:
            raise ValueError(
                f"initial_sparsity is {self.initial_sparsity}, but the {self.sparsity_schedule} schedule starts "
                f"{below} below a sparsity of {self.sparsity}: leave initial_sparsity out"
            )
        if self.selects and self.percolation:
            raise ValueError(
                f"percolation is true, but with regrowth {self.regrowth!r} nothing is regrown: set percolation to false"
            )
        if any("stored" in part.needs for part in self._scores()) and self.regrown_weights != "historical":
            raise ValueError(
                f"regrowth is {self.regrowth!r} and regrown_weights {self.regrown_weights!r}: links that return by "
                "their stored weight must start with it. Set regrown_weights: historical"
            )
        if self.softness_schedule == "adaptive" and self.removal_choice != "soft":
            raise ValueError(
                f"softness_schedule is 'adaptive', but removal_choice is {self.removal_choice!r}: set removal_choice: "
                "soft, or softness_schedule: linear"
            )
        self._check_patterns()

    def _check_patterns(self) -> None:
        patterns = [("target_modules", pattern) for pattern in self.target_modules or []]
        patterns += [("exclude_modules", pattern) for pattern in self.exclude_modules or []]
        patterns += [("layer_sparsity", pattern) for pattern in self.layer_sparsity or ()]
        for name, pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{name} has {pattern!r}, which is no regular expression: {error}") from error
        for pattern, sparsity in self.overrides.items():
            if not (isinstance(sparsity, float) and 0 < sparsity < 1):
                raise ValueError(
                    f"layer_sparsity has {sparsity!r} for {pattern!r}; it must be a number strictly between 0 and 1. "
                    "To keep layers dense, name them in exclude_modules"
                )

    def _check_types(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if hint is float and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, name, float(value))
            elif hint in (float, int, str, bool) and type(value) is not hint:
                advice = ""
                if isinstance(value, str) and hint is float:
                    advice = " (YAML reads 3e-1 as text: write 3.0e-1)"
                raise ValueError(f"{name} is {value!r}; it must be {_article(hint)}{advice}")
            elif name == "layer_sparsity":
                if not (value is None or (isinstance(value, dict) and all(isinstance(key, str) for key in value))):
                    raise ValueError(f"{name} is {value!r}; it must map module names or patterns to numbers")
            elif (
                list[str] in get_args(hint)
                and value is not None
                and not (isinstance(value, list) and value and all(isinstance(item, str) for item in value))
            ):
                raise ValueError(f"{name} is {value!r}; it must be a list of module names or patterns")


def _mapping(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f'{name} is {text!r}, which is no JSON: {error}; for example {{"down_proj": 0.95}}') from error


def _article(kind: type) -> str:
    return {float: "a number", int: "a whole number", str: "text", bool: "true or false"}[kind]


def _unknown(what: str, value: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(value), list(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {value!r}{hint} Known: {', '.join(known)}".replace("?;", "?")

"""The parts that methods are made of, by name: whoever defines one registers it, and nobody else decides by its name.

A score, an initial topology, a schedule or a method of your own needs no change of this package:

    from hf_chts import register

    @register.regrowth("strength")
    def strength(mask, weight):
        size = weight.abs()
        return size.sum(1, keepdim=True) * size.sum(0, keepdim=True)

The names of a function's parameters say what it needs; parameters with a default get it, or a field of the config that
`options` names.
"""

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
Cost = Callable[[int, int], float]

# What a part of each kind may ask for by the names of its parameters
_SCORE_NEEDS = {"mask", "weight", "grad", "stored"}
_NEEDS = {
    "removal": _SCORE_NEEDS,
    "regrowth": _SCORE_NEEDS,
    "selection": {*_SCORE_NEEDS, "links", "generator"},
    "initial_topology": {"out_features", "in_features", "links", "generator", "inputs"},
    "sparsity_schedule": {"step", "start", "end", "initial", "final"},
}


def _one_sort(out_features: int, in_features: int) -> float:
    """Roughly the operations of choosing by a score that is cheap itself."""
    numel = out_features * in_features
    return 100 * numel * math.log2(max(numel, 2)) / 16


@dataclass(frozen=True)
class Part:
    """A registered part.

    Attributes:
        name, kind: as registered; kind is a field of the config, or "selection".
        function: see `Register`.
        module: that the function is defined in.
        needs: what the function is called with, by name.
        options: config fields by the names of the parameters that they go to.
        cost: roughly the operations for a layer of (out, in), to share layers out over ranks.
        sampler: `sampler(mask, k, generator=…)` draws what a soft choice by the score would, without the score.
        sampler_cost: as `cost`, for the sampler.
        facts: what else there is to know of a part of its kind.
    """

    name: str
    kind: str
    function: Callable[..., Any]
    module: str
    needs: frozenset[str]
    options: Mapping[str, str] = field(default_factory=dict)
    cost: Cost = _one_sort
    sampler: Callable[..., Any] | None = None
    sampler_cost: Cost = _one_sort
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, config: Any, **given: Any) -> Any:
        """Call the function with those of `given` that it needs, and with its options from `config`."""
        options = {parameter: getattr(config, name) for parameter, name in self.options.items()}
        return self.function(**{name: given[name] for name in self.needs}, **options)


@dataclass(frozen=True)
class Method:
    """A method: what the config's fields are where a run says nothing.

    Attributes:
        settings: those that arXiv 2501.19107 compares all methods with.
        original: those of the method's own paper; None where they are not known for sure.
        module: that registers it.
    """

    settings: Mapping[str, Any]
    original: Mapping[str, Any] | None
    module: str


REMOVAL: dict[str, Part] = {}
REGROWTH: dict[str, Part] = {}  # selections too: they take the place of removal and regrowth
INITIAL_TOPOLOGIES: dict[str, Part] = {}
SPARSITY_SCHEDULES: dict[str, Part] = {}
METHODS: dict[str, Method] = {}


class Register:
    """Decorators, one for each kind of part. The same name a second time replaces nothing: it raises ValueError."""

    def removal(self, name: str, **facts: Any) -> Callable[[_Function], _Function]:
        """A score of links, by which the lowest are removed, or pruned as sparsity rises.

        The function takes any of `weight`, `mask`, `grad` (the dense gradient), `stored` (weights of removed links),
        all (out, in), and returns scores (out, in), finite and >= 0 on the links.
        """
        return self._add(REMOVAL, "removal", name, **facts)

    def regrowth(self, name: str, *, cost: Cost = _one_sort, **facts: Any) -> Callable[[_Function], _Function]:
        """A score of missing links, by which the highest are regrown.

        The function takes any of the same, of which `mask` and `weight` have the links that removal left, and returns
        scores (out, in), finite and >= 0 on missing links.

        Args:
            cost: see `Part`.
        """
        return self._add(REGROWTH, "regrowth", name, cost=cost, **facts)

    def sampler(self, name: str, *, cost: Cost = _one_sort) -> Callable[[_Function], _Function]:
        """What draws soft by a registered regrowth score without making it: `sampler(mask, k, *, generator)`.

        It returns bool (out, in) with k missing links, each drawn ∝ its score among those left.
        """

        def add(function: _Function) -> _Function:
            REGROWTH[name] = replace(REGROWTH[name], sampler=function, sampler_cost=cost)
            return function

        return add

    def selection(self, name: str, **facts: Any) -> Callable[[_Function], _Function]:
        """A choice of all links at once, in the place of removal and regrowth; it is named as a `regrowth`.

        The function takes any of the same, `links` (how many there are to be) and `generator`, and returns the new
        mask, bool (out, in): see `hf_chts.topology.gmp`.
        """
        return self._add(REGROWTH, "selection", name, **facts)

    def initial_topology(self, name: str, **facts: Any) -> Callable[[_Function], _Function]:
        """A topology to start with.

        The function takes `out_features`, `in_features`, `links`, `generator`, and `inputs` (samples, in) if it needs
        calibration inputs, and returns bool (out, in) with exactly `links` links. It is drawn on the CPU.
        """
        return self._add(INITIAL_TOPOLOGIES, "initial_topology", name, **facts)

    def sparsity_schedule(
        self, name: str, *, starts_below: float | None = None, until: float = 1.0, **facts: Any
    ) -> Callable[[_Function], _Function]:
        """How sparsity goes from `initial` at the step `start` to `final` at `end`: a function of these and `step`.

        Args:
            starts_below: how far below the final sparsity it starts, where it is not free to choose.
            until: where it ends, as a fraction of update_until, where a run says nothing.
        """
        return self._add(SPARSITY_SCHEDULES, "sparsity_schedule", name, starts_below=starts_below, until=until, **facts)

    def method(self, name: str, *, original: Mapping[str, Any] | None = None, **settings: Any) -> None:
        """A method made of registered parts: fields of SparsityConfig and their values; `original`: see `Method`."""
        self._refuse_twice("method", METHODS, name)
        METHODS[name] = Method(settings, original, _caller())

    def _add(self, parts: dict[str, Part], kind: str, name: str, **facts: Any) -> Callable[[_Function], _Function]:
        def add(function: _Function) -> _Function:
            self._refuse_twice(kind, parts, name)
            options = facts.pop("options", {})
            parameters = inspect.signature(function).parameters.values()
            needs = frozenset(p.name for p in parameters if p.default is p.empty and p.name not in options)
            if unknown := needs - _NEEDS[kind]:
                raise ValueError(
                    f"the {kind} {name!r} asks for {sorted(unknown)}, but a {kind} can have {sorted(_NEEDS[kind])}; "
                    "other parameters need a default, or a config field in options={parameter: field}"
                )
            known = {"cost": facts.pop("cost")} if "cost" in facts else {}
            parts[name] = Part(name, kind, function, function.__module__, needs, options, facts=facts, **known)
            return function

        return add

    @staticmethod
    def _refuse_twice(kind: str, parts: Mapping[str, Any], name: str) -> None:
        if name in parts:
            raise ValueError(f"there is a {kind} {name!r} already, of {parts[name].module}: choose another name")


register = Register()


def import_parts(modules: Sequence[str]) -> list[str]:
    """Import modules that register parts, by name or by the path of a .py file; the names of the modules.

    Raises:
        ValueError: one cannot be imported; the message names it and why.
    """
    names = []
    for module in modules:
        path = Path(module)
        name = path.stem if path.suffix == ".py" else module
        names.append(name)
        if name in sys.modules:
            continue
        try:
            if path.suffix == ".py":
                spec = importlib.util.spec_from_file_location(name, path)
                assert spec is not None
                assert spec.loader is not None
                loaded = importlib.util.module_from_spec(spec)
                sys.modules[name] = loaded
                try:
                    spec.loader.exec_module(loaded)
                except BaseException:
                    del sys.modules[name]
                    raise
            else:
                importlib.import_module(name)
        except Exception as error:
            raise ValueError(f"the parts {module!r} cannot be imported: {type(error).__name__}: {error}") from error
    return names


def foreign_modules(parts: Sequence[Part | Method]) -> Iterator[str]:
    """The modules outside this package that the parts come from."""
    return (part.module for part in parts if part.module.partition(".")[0] != __name__.partition(".")[0])


def _caller() -> str:
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "__main__")) if frame is not None else "__main__"

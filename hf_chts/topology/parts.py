"""The parts that methods are made of. A part registers itself with all that others need to know of it.

A score, an initial topology, a schedule or a method of your own needs no change in this package:

    from hf_chts import register

    @register.regrowth("strength")
    def strength(mask, weight):
        size = weight.abs()
        return size.sum(1, keepdim=True) * size.sum(0, keepdim=True)

A function is called with what its parameters ask for by name. Parameters with a default keep it, unless `options` gives
them a field of the config.
"""

import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Decorator = Callable[[_Function], _Function]
_Options = Mapping[str, str]
_NO_OPTIONS: _Options = {}
Cost = Callable[[int, int], float]  # (out_features, in_features) → operations

# What the parameters of each kind of part may ask for
_SCORE_NEEDS = {"mask", "weight", "grad", "stored"}
_NEEDS = {
    "removal": _SCORE_NEEDS,
    "regrowth": _SCORE_NEEDS,
    "selection": {*_SCORE_NEEDS, "links", "generator", "neurons", "choose"},
    "initial_topology": {
        *("out_features", "in_features", "links", "generator", "inputs", "input_norms", "weight", "choose"),
    },
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
        module: where the function is defined.
        needs: names of the parameters that the function is called with.
        options: names of config fields, by the parameters that get their values.
        cost: roughly the operations that an update of a layer of (out, in) takes, to share layers out over ranks.
        sampler: `sampler(mask, k, generator=…)`: draws what a soft choice by the score would, without the score.
        sampler_cost: like `cost`, for the sampler.
        stack_sampler: `stack_sampler(masks, k, seeds)`: the same for a stack of layers.
        by_link: see `Register.removal`.
        stacks: see `Register.removal`.
        trains_missing: see `Register.selection`.
        starts_below, until: of a sparsity schedule, see `Register.sparsity_schedule`.
    """

    name: str
    kind: str
    function: Callable[..., Any]
    module: str
    needs: frozenset[str]
    options: Mapping[str, str]
    cost: Cost = _one_sort
    sampler: Callable[..., Any] | None = None
    sampler_cost: Cost = _one_sort
    stack_sampler: Callable[..., Any] | None = None
    by_link: bool = False
    stacks: bool = False
    trains_missing: bool = False
    starts_below: float | None = None
    until: float = 1.0

    def __call__(self, config: Any, **given: Any) -> Any:
        """Call the function with those of `given` that it needs, and with its options from `config`."""
        options = {parameter: getattr(config, name) for parameter, name in self.options.items()}
        return self.function(**{name: given[name] for name in self.needs}, **options)

    def check(self, result: Any, shape: tuple[int, ...], links: int | None = None) -> Any:
        """`result` again, if it is what the function must return: scores, or a mask with `links` links.

        Raises:
            ValueError: it is not; the message names the part.
        """
        if not isinstance(result, Tensor):
            found, right = f"a {type(result).__name__}", False
        elif links is None:
            found, right = f"{result.dtype} {tuple(result.shape)}", result.is_floating_point()
        else:
            count = int(torch.count_nonzero(result))
            found, right = f"{result.dtype} {tuple(result.shape)} with {count} links", result.dtype == torch.bool
            right = right and count == links
        if not right or result.shape != shape:
            wanted = f"floating point {shape}" if links is None else f"bool {shape} with {links} links"
            raise ValueError(f"the {self.kind} {self.name!r} returned {found}; it must return {wanted}")
        return result


@dataclass(frozen=True)
class Method:
    """The defaults that a method gives to fields of the config.

    Attributes:
        settings: those of the comparison in arXiv 2501.19107.
        original: what the method's own paper has instead; None if that is not known for sure.
        module: where it is registered.
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
    """Decorators, one for each kind of part.

    `options`, which all but methods take, are names of config fields by the parameters that get their values.

    Raises:
        ValueError: the name is taken by a part from another place, or the function asks for something unknown.
    """

    def removal(
        self, name: str, *, options: _Options = _NO_OPTIONS, by_link: bool = False, stacks: bool = False
    ) -> _Decorator:
        """A score of links: the lowest are removed, or pruned as sparsity rises.

        The function takes any of `mask` (bool), `weight` (0 off the mask), `grad` (the dense gradient) and `stored`
        (the weights of removed links), all (out, in), and returns floating point scores (out, in), finite and >= 0 on
        the links.

        Args:
            by_link: the score of a link depends on no other, so that the function may also be called with the values
                of the links alone, all (links,).
            stacks: the function also takes layers of one shape together, all (layers, out, in).
        """
        return _adding(REMOVAL, "removal", name, options, by_link=by_link, stacks=stacks)

    def regrowth(
        self, name: str, *, options: _Options = _NO_OPTIONS, cost: Cost = _one_sort, stacks: bool = False
    ) -> _Decorator:
        """A score of missing links: the highest are regrown.

        The function takes the same as a removal score, with `mask` and `weight` as removal left them, and returns
        floating point scores (out, in), finite and >= 0 on missing links.

        Args:
            cost: see `Part`.
            stacks: see `removal`.
        """
        return _adding(REGROWTH, "regrowth", name, options, cost=cost, stacks=stacks)

    def sampler(self, name: str, *, cost: Cost = _one_sort, stack: Callable[..., Any] | None = None) -> _Decorator:
        """A way to draw by a registered regrowth score without computing it: `sampler(mask, k, *, generator)`.

        It returns bool (out, in) with k missing links, drawn one after another with probability ∝ score.

        Args:
            cost: see `Part`.
            stack: draws for several layers: `stack(masks, k, seeds)` with bool (layers, out, in), and a number of links
                and a signed 64-bit seed for each layer; returns bool (layers, out, in).
        """

        def add(function: _Function) -> _Function:
            if name not in REGROWTH:
                raise ValueError(f"there is no regrowth {name!r} to sample for: register its score first")
            REGROWTH[name] = replace(REGROWTH[name], sampler=function, sampler_cost=cost, stack_sampler=stack)
            return function

        return add

    def selection(
        self, name: str, *, options: _Options = _NO_OPTIONS, cost: Cost = _one_sort, trains_missing: bool = False
    ) -> _Decorator:
        """A choice of all links at once, in place of removal and regrowth; the config's `regrowth` names it.

        The function takes the same as a removal score, and `neurons` (the dimension of the weight that counts neurons,
        0 or 1; None: neither), and returns the new mask, bool (out, in). It leaves the choice to `choose` (floating
        point scores (out, in) → the mask of the highest), which keeps to a pattern; or it takes `links`, the number to
        choose, and `generator`, and runs without a pattern alone. See `hf_chts.topology.gmp`.

        Args:
            trains_missing: missing links have gradients and moments too, so that `weight` is that of all of them, as
                the optimizer's step left it; they are 0 again after the update. See `hf_chts.topology.largest`.
        """
        return _adding(REGROWTH, "selection", name, options, cost=cost, trains_missing=trains_missing)

    def initial_topology(self, name: str, *, options: _Options = _NO_OPTIONS) -> _Decorator:
        """A topology to start with.

        The function takes any of `out_features`, `in_features`, `links`, `generator`; `weight` (out, in), at least
        float32, of a model that has been trained; and, of calibration inputs, `inputs` (samples, in) or their norms
        over the samples, `input_norms` (in,), float32. It returns bool (out, in) with exactly `links` links. It is
        drawn on the CPU. Under a pattern it keeps those links for which there is room; one that goes by scores asks
        for `choose`, as a selection does, and then it is the best ones that stay.
        """
        return _adding(INITIAL_TOPOLOGIES, "initial_topology", name, options)

    def sparsity_schedule(
        self,
        name: str,
        *,
        options: _Options = _NO_OPTIONS,
        starts_below: float | None = None,
        until: float = 1.0,
    ) -> _Decorator:
        """How sparsity goes from `initial` at step `start` to `final` at step `end`: a function of these and `step`.

        Args:
            starts_below: how far below the final sparsity it starts; None: wherever the run wants it to.
            until: where it ends by default, as a fraction of update_until.
        """
        facts = {"starts_below": starts_below, "until": until}
        return _adding(SPARSITY_SCHEDULES, "sparsity_schedule", name, options, **facts)

    def method(self, name: str, *, original: Mapping[str, Any] | None = None, **settings: Any) -> None:
        """A method made of registered parts.

        Args:
            original: see `Method`.
            settings: fields of SparsityConfig and the defaults that the method gives them.
        """
        module = _caller()
        _refuse_taken("method", name, METHODS, module)
        METHODS[name] = Method(settings, original, module)


register = Register()


def _adding(parts: dict[str, Part], kind: str, name: str, options: _Options, **more: Any) -> _Decorator:
    def add(function: _Function) -> _Function:
        _refuse_taken(kind, name, parts, function.__module__)
        parameters = inspect.signature(function).parameters.values()
        needs = frozenset(p.name for p in parameters if p.default is p.empty and p.name not in options)
        if unknown := needs - _NEEDS[kind]:
            raise ValueError(
                f"the {kind} {name!r} asks for {sorted(unknown)}, but a {kind} can have {sorted(_NEEDS[kind])}; "
                "other parameters need a default, or a config field in options={parameter: field}"
            )
        parts[name] = Part(name, kind, function, function.__module__, needs, options, **more)
        return function

    return add


def _refuse_taken(kind: str, name: str, registered: Mapping[str, Part | Method], module: str) -> None:
    # a module of a user's may be run again, as a notebook's cells are
    if name in registered and (module != registered[name].module or _is_ours(module)):
        raise ValueError(f"there is a {kind} {name!r} already, from {registered[name].module}: choose another name")


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == __name__.partition(".")[0]


def _caller() -> str:
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "__main__")) if frame is not None else "__main__"


def import_parts(modules: Sequence[str]) -> list[str]:
    """Import modules that register parts.

    Args:
        modules: names, looked up in the working directory too, or paths of .py files.

    Returns:
        The names of the modules, as `sys.modules` has them.

    Raises:
        ValueError: one cannot be imported; the message names it and the reason.
    """
    names = []
    for module in modules:
        path = Path(module) if module.endswith(".py") else None
        name = path.stem if path else module
        names.append(name)
        if name == _main_module():  # the script that registers parts itself: importing it would run it again
            continue
        try:
            if path:
                _import_file(name, path)
                continue
            if os.getcwd() not in sys.path:  # scripts and commands have only their own directory there
                sys.path.append(os.getcwd())
            importlib.import_module(name)
        except Exception as error:
            raise ValueError(f"the parts {module!r} cannot be imported: {type(error).__name__}: {error}") from error
    return names


def _import_file(name: str, path: Path) -> None:
    if name in sys.modules:
        there = getattr(sys.modules[name], "__file__", None)
        if there is None or Path(there).resolve() != path.resolve():
            raise ImportError(f"another module is called {name!r}: rename the file")
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise


def modules_of(parts: Sequence[Part | Method], named: Sequence[str]) -> list[str]:
    """The modules outside this package that register `parts`: those in `named`, and any others after them."""
    modules = dict.fromkeys(named)
    for part in parts:
        module = _main_module() if part.module == "__main__" else part.module
        if module and not _is_ours(module) and not any(f"{module}.".startswith(f"{name}.") for name in modules):
            modules[module] = None
    return list(modules)


def _main_module() -> str | None:
    """The name by which others could import the running script; None in an interactive session."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    return spec.name if spec else Path(file).stem if file else None

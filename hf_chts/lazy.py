"""Public names of a package that are imported when they are first used, so that importing the package is quick."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, Sequence[str]], renamed: Mapping[str, str] | None = None
) -> tuple[list[str], Callable[[str], Any]]:
    """A package's `__all__`, and its `__getattr__` (PEP 562).

    Args:
        package: its `__name__`.
        modules: the public names by the module of the package that defines them.
        renamed: old names and their new ones; an old name still works, with a DeprecationWarning.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:
        if renamed and name in renamed:
            message = f"{package}.{name} is now called {renamed[name]}; the next release removes the old name"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return __getattr__(renamed[name])
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{module_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return sorted(module_of), __getattr__

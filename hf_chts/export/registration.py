"""Let `from_pretrained` load packed directories once hf_chts is imported, without importing transformers for it."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_LOADER = "hf_chts.export.packed_loading"
_AFTER = "transformers.modeling_utils"  # has from_pretrained, and everything that the loader needs


def register_packed_loading() -> None:
    """Import the loader of packed directories: at once if transformers can load models, else when it first can."""
    if _AFTER in sys.modules:
        import_module(_LOADER)
    elif not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTransformers())


class _AfterTransformers(MetaPathFinder):
    """Finds no module itself, but has the loader imported after the one that it needs."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _AFTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                import_module(_LOADER)

            loader.exec_module = execute_and_register
        return spec

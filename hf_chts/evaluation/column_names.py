"""Short names for the columns of a table."""

from collections.abc import Sequence


def column_names(models: Sequence[str], widest: int = 28) -> list[str]:
    """Short, distinct names: as many of the last parts of each path as tell it from the others, cut in the middle."""
    parts = [model.rstrip("/").split("/") for model in models]
    depth, deepest = 1, max(map(len, parts), default=1)
    names = _last(parts, depth)
    while len(set(names)) < len(names) and depth < deepest:
        depth += 1
        names = _last(parts, depth)
    half = widest // 2
    names = [name if len(name) <= widest else f"{name[: widest - half - 1]}…{name[-half:]}" for name in names]
    if len(set(names)) < len(names):
        names = [f"{i}: {name}" for i, name in enumerate(names, start=1)]
    return names


def _last(parts: list[list[str]], depth: int) -> list[str]:
    return ["/".join(part[-depth:]) for part in parts]

"""Names of layers, runs and models, made as short as possible while they stay distinct."""

from collections.abc import Collection, Sequence


def shortest_endings(names: Sequence[str], separator: str) -> list[str]:
    """The shortest ending of each name, in whole parts, that no other name has; else the whole name."""
    split = [name.split(separator) for name in names]

    def ending(parts: list[str]) -> str:
        for count in range(1, len(parts)):
            if sum(other[-count:] == parts[-count:] for other in split) == 1:
                return separator.join(parts[-count:])
        return separator.join(parts)

    return [ending(parts) for parts in split]


def column_names(models: Sequence[str], widest: int = 28) -> list[str]:
    """Short, distinct names for paths or Hub ids, cut in the middle where they are longer than `widest`.

    Names that are the same after that are numbered, which takes some more characters.
    """
    half = widest // 2
    names = [
        name if len(name) <= widest else f"{name[: widest - half - 1]}…{name[-half:]}"
        for name in shortest_endings([model.rstrip("/") for model in models], "/")
    ]
    if len(set(names)) < len(names):
        names = [f"{number}: {name}" for number, name in enumerate(names, start=1)]
    return names


def layer_kind(name: str) -> str:
    """A layer's name without the numbers of blocks and experts: what it has in common with its siblings."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def last_part(name: str) -> str:
    """The last part of a layer's name that is not a number: "down_proj", or "experts" for "mlp.experts.3"."""
    return layer_kind(name).rpartition(".")[2] or name


def listed(names: Collection[str]) -> str:
    """Names for a sentence, with the number of all if there are many."""
    first = ", ".join(list(names)[:8]) or "none"
    return first if len(names) <= 8 else f"{first}, … ({len(names)} in all)"

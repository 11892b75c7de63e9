"""Files of settings, YAML or JSON: read in one way, whoever reads them, and refused by name where they are doubtful."""

import json
from pathlib import Path
from typing import Any

import yaml

# of a checkout, which has the folder configs
ROOT = Path(__file__).parents[1]


def read_mapping(path: str | Path, what: str) -> dict[str, Any]:
    """The fields that a file of settings gives values to; `what` the file is, for errors.

    Raises:
        FileNotFoundError, ValueError: as `read`, and for what is no mapping of fields to values.
    """
    values = read(path)
    if values is None:
        raise ValueError(f"{path} is empty; {what} is a mapping of fields to values")
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; {what} is a mapping of fields to values")
    return values


def read(path: str | Path) -> Any:
    """What a file of settings holds: JSON where its name ends so, else YAML; None where it is empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no UTF-8, no valid YAML or JSON, or has a key twice or an anchor; the message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path}: name one, such as configs/demo.yaml")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} is not UTF-8 (line {line}): save it as UTF-8 text") from error
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        return json.loads(text, object_pairs_hook=_pairs) if kind == "JSON" else yaml.load(text, _StrictLoader)
    except _Doubtful as error:
        raise ValueError(f"{path} {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not valid {kind}: it is nested too deeply") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not valid {kind}: {_reason(error)}") from error


def find(name: str, *folders: Path) -> str:
    """`name` as it is where there is such a path or where it is absolute, else in the first of `folders` that has it;
    `name` where none has, for it may be no path."""
    if not Path(name).exists():
        for folder in folders:
            if (folder / name).exists():
                return str(folder / name)
    return name


class _Doubtful(Exception):
    """Valid, and yet not to be taken; the text goes on after the name of the file."""


class _StrictLoader(yaml.SafeLoader):
    """YAML without what takes a value silently for another: keys that stand twice, and anchors, which may also hide
    megabytes in a line."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if event.anchor is not None:
            raise _Doubtful(
                f"has the anchor or alias {event.anchor!r} in line {event.start_mark.line + 1}: write out the value"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _Doubtful(f"has a key in line {line} that is no name")
            if key.value in lines:
                raise _Doubtful(_twice(key.value, f" (lines {lines[key.value]} and {line})"))
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise _Doubtful(_twice(name))
        values[name] = value
    return values


def _twice(name: str, where: str = "") -> str:
    return f"has {name!r} twice{where}: leave one of them out"


def _reason(error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return str(error)
    advice = ": indent with spaces" if "'\\t'" in problem else ""
    return f"{problem} in line {mark.line + 1}{advice}"

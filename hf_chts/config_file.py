"""Files of settings, YAML or JSON. Nothing doubtful is guessed: the error names the file and the line."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

_PACKAGE = Path(__file__).parent
# The directory that holds configs/: the package where it was installed from a wheel, else the checkout
PRESETS_ROOT = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent

# The studies that come with the project, likewise
INSTALLED_STUDIES = "study_files"
STUDIES = _PACKAGE / INSTALLED_STUDIES if (_PACKAGE / INSTALLED_STUDIES).is_dir() else _PACKAGE.parent / "studies"


def read_mapping(path: str | Path, what: str) -> dict[str, Any]:
    """The fields and values of a settings file; `what` it describes, for errors.

    Raises:
        FileNotFoundError, ValueError: as `read`, and where the file is empty or not a mapping.
    """
    values = read(path)
    if values is None:
        raise ValueError(f"{path} is empty; {what} is a mapping of fields to values")
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; {what} is a mapping of fields to values")
    return values


def read(path: str | Path) -> Any:
    """The contents of a settings file: JSON if its name ends in .json, else YAML; None if it is empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, not valid YAML or JSON, or has a key twice or a YAML anchor.
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
        return json.loads(text, object_pairs_hook=_unique) if kind == "JSON" else yaml.load(text, _StrictLoader)
    except _Doubtful as error:
        raise ValueError(f"{path} {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not valid {kind}: it is nested too deeply") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not valid {kind}: {_reason(error)}") from error


def find(name: str, *folders: Path) -> str:
    """`name` if there is such a path, else the path in the first of `folders` that has it, else `name` itself, which
    may be a Hub id."""
    if not Path(name).exists():
        for folder in folders:
            if (folder / name).exists():
                return str(folder / name)
    return name


def find_config(name: str | Path) -> Path:
    """The config file `name`, from the working directory or among the presets, which may go by their bare names.

    Raises:
        FileNotFoundError: there is neither such a file nor such a preset.
    """
    presets = PRESETS_ROOT / "configs"
    for path in (Path(name), PRESETS_ROOT / name, presets / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in presets.glob("*.yaml")))
    raise FileNotFoundError(f"there is no config file {name}: name a YAML file or a preset ({known})")


def find_study(name: str | Path) -> Path:
    """The file of a study, from the working directory or among those of the project, which may go by their bare names.

    Raises:
        FileNotFoundError: there is neither such a file nor such a study.
    """
    bare = Path(name).name == str(name)  # a path with a folder means that file and no other
    for path in (Path(name), *([STUDIES / name, STUDIES / f"{name}.yaml"] if bare else [])):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in STUDIES.glob("*.yaml")))
    raise FileNotFoundError(f"there is no study {name}: name a YAML file or one of the project's ({known})")


class _Doubtful(Exception):
    """The file is valid, but could be misread. The message continues after the file's name."""


class _StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys, whose first value would be lost, and without anchors, by which one line can grow to
    megabytes; and with 3e-4 as a number, as in YAML 1.2."""

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
                raise _Doubtful(f"has a key in line {line} that is not a name")
            if key.value in lines:
                raise _Doubtful(f"has {key.value!r} twice (lines {lines[key.value]} and {line}): leave one of them out")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise _Doubtful(f"has {name!r} twice: leave one of them out")
        values[name] = value
    return values


def _reason(error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return str(error)
    advice = ": indent with spaces" if "'\\t'" in problem else ""
    return f"{problem} in line {mark.line + 1}{advice}"

"""A run from a YAML file and the command line: every field of the dataclasses can stand in either, the latter wins."""

import argparse
import dataclasses
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hf_chts.command_help import RunHelp, describe
from hf_chts.config_file import ROOT, find, read_mapping

# which name a file or a folder, or something else
_PATHS = ("model", "dataset", "tokenizer")


def parse_run(
    kinds: Sequence[Any],
    argv: Sequence[str],
    *,
    default_config: str | Path | None,
    description: str,
    unused: Sequence[Any] = (),
    program: str | None = None,
) -> tuple[Any, ...]:
    """Read `--config FILE` (YAML) and `--field value` options into one instance of each dataclass.

    Relative paths in the file are looked up from the working directory, then from the file's own folder; the file
    itself from the working directory, then among those that come with the library.

    Args:
        kinds: dataclasses with distinct field names.
        argv: the command line without the program's name.
        default_config: read when there is no `--config`; None: nothing is.
        unused: dataclasses whose fields may stand in the file too, for other commands read it.
        program: its name, in usage and errors; by default that of the script.

    Returns:
        An instance of each of `kinds`, in order.

    Raises:
        FileNotFoundError: there is no such config file.
        ValueError: the file is not to be used (see `read_mapping`), or a field is unknown or has a value out of range.
        SystemExit: argparse's own, with a message, for a value that does not parse and for --help.
    """
    parser = HfArgumentParser(
        list(kinds),
        prog=program,
        usage="%(prog)s [--config FILE] [--option value]…",
        description=description,
        allow_abbrev=False,
        formatter_class=RunHelp,
    )
    shown = _short(default_config) if default_config else "none"
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=default_config and str(default_config),
        help=f"YAML file with any of the options below, which win over it; what it sets stands "
        f"beside their defaults. Default: {shown}.",
    )
    first = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=default_config)
    config = first.parse_known_args(argv)[0].config
    known = {action.dest for action in parser._actions} - {"help", "config"}
    fields = known | {field.name for kind in unused for field in dataclasses.fields(kind) if field.init}
    values = {} if config is None else _read(Path(find(str(config), ROOT)), fields)
    values = {name: value for name, value in values.items() if name in known}
    describe(parser, kinds, _short(config or ""), values)
    parser.set_defaults(**values)
    *instances, namespace, rest = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
    del namespace  # holds only --config
    if rest:
        name = rest[0].removeprefix("--").split("=")[0]
        raise ValueError(f"unknown option {rest[0]}{_closest(name, known)}: --help lists them all")
    return tuple(instances)


def _short(path: str | Path) -> str:
    return "/".join(Path(path).parts[-2:])


def _read(path: Path, known: set[str]) -> dict[str, Any]:
    values = read_mapping(path, "a run")
    for name in values:
        if name not in known:
            raise ValueError(f"{path} has an unknown field {name!r}{_closest(str(name), known)}")
    for name in _PATHS:
        if isinstance(values.get(name), str):
            values[name] = find(values[name], path.parent)
    return {name: _as_argument(value) for name, value in values.items()}


def _as_argument(value: Any) -> Any:
    """As text, argparse gives a value its field's type with the same checks as on the command line. YAML's own types
    will not do: it reads 3e-4 as text and 8.5 where a whole number belongs without a word."""
    if value is None:
        return None
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        return [str(item) for item in value]
    return str(value)


def _closest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

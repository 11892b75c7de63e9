"""The options of a run: the fields of dataclasses, set in a YAML file and on the command line, which wins."""

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from hf_chts.commands.options_help import RunHelp, describe
from hf_chts.config_file import find, find_config, read_mapping

# Fields that may name a file or a directory
_PATHS = ("model", "dataset", "tokenizer")
# TrainingArguments declares them as text, but documents true
_TEXT_OR_BOOL = ("resume_from_checkpoint", "fsdp")
_IN_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def parse_run(
    kinds: Sequence[Any],
    argv: Sequence[str],
    *,
    program: str,
    description: str,
    default_config: Path | None = None,
    in_file_too: Sequence[Any] = (),
    only_in_file: Collection[str] = (),
) -> tuple[Any, ...]:
    """Read `--config FILE` and `--field value` options into one instance of each dataclass.

    Args:
        kinds: dataclasses with distinct field names.
        argv: the command line without the program's name.
        program: the name in usage and errors.
        default_config: the file to read without `--config`; None: no file.
        in_file_too: dataclasses whose fields the file may set for other commands. They are not read here.
        only_in_file: fields of `kinds` that are not options of this command.

    Returns:
        An instance of each of `kinds`, in order.

    Raises:
        FileNotFoundError: there is no such config file or preset.
        ValueError: the file cannot be read (see `read_mapping`), a field or an option is unknown, or a value has the
            wrong type or is out of range.
        SystemExit: for --help, and argparse's own for an option whose value does not parse.
    """
    parser = HfArgumentParser(
        list(kinds),
        prog=program,
        usage="%(prog)s [--config FILE] [--option value]…",
        description=description,
        allow_abbrev=False,
        formatter_class=RunHelp,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with any of the options below, or the name of a preset, such as llama_60m. Options win over "
        f"the file; what it sets stands beside their defaults. Default: {getattr(default_config, 'stem', 'none')}.",
    )
    fields = {field.name: field for kind in kinds for field in dataclasses.fields(kind) if field.init}
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items() if name in fields}
    first = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=default_config)
    config = first.parse_known_args(argv)[0].config
    values: dict[str, Any] = {}
    if config is not None:
        others = {field.name for kind in in_file_too for field in dataclasses.fields(kind) if field.init}
        values = _read(find_config(config), fields, hints, others)
    for action in parser._actions:
        # the dataclasses have the defaults, and what was not given leaves the file's value alone
        action.default = argparse.SUPPRESS
        if action.dest in only_in_file:
            for name in action.option_strings:
                del parser._option_string_actions[name]
            action.help = argparse.SUPPRESS
        elif action.dest in fields:
            _set_type(action, hints[action.dest], fields[action.dest].default is None)
    describe(parser, fields, Path(config or "").name, values)
    namespace, rest = parser.parse_known_args(list(argv))
    if rest:
        name = rest[0].removeprefix("--").split("=")[0]
        raise ValueError(f"unknown option {rest[0]}{_closest(name, fields)}: --help lists them all")
    given = {name: None if value == [None] else value for name, value in vars(namespace).items() if name != "config"}
    return tuple(parser.parse_dict(values | given))


def _read(path: Path, fields: Mapping[str, Any], hints: Mapping[str, Any], others: Collection[str]) -> dict[str, Any]:
    """What the file sets of `fields`, each value as its field's type has it."""
    values = read_mapping(path, "a run")
    for name in values:
        if name not in fields and name not in others:
            raise ValueError(f"{path} has an unknown field {name!r}{_closest(str(name), [*fields, *others])}")
    for name in _PATHS:
        if isinstance(values.get(name), str):
            values[name] = find(values[name], path.parent)
    try:
        return {
            name: None if value is None and fields[name].default is None else _typed(name, value, hints[name])
            for name, value in values.items()
            if name in fields
        }
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as a field of type `hint` takes it. The dataclasses check choices and the items of lists and mappings.

    Raises:
        ValueError: the value has another type.
    """
    if name in _TEXT_OR_BOOL and isinstance(value, bool):
        return value
    kinds = _kinds(hint)
    choices = [kind for kind in kinds if kind not in (*_IN_WORDS, NoneType)]  # Enum or Literal
    if type(value) in kinds or (value is None and NoneType in kinds) or (isinstance(value, str) and choices):
        return value
    if type(value) is int and float in kinds:
        return float(value)
    if isinstance(value, str) and list in kinds:
        return [value]
    takes_text = str in kinds or choices
    remedy = ""
    if takes_text and not isinstance(value, dict | list | None):
        remedy = ": put it in quotes" + (", YAML reads yes, no, on and off as bool" if isinstance(value, bool) else "")
    elif isinstance(value, str) and re.fullmatch(r"[-+.\de]+|true|false", value, re.IGNORECASE):
        remedy = ": leave out the quotes"
    allowed = " or ".join(words for kind, words in _IN_WORDS.items() if kind in kinds or (kind is str and takes_text))
    raise ValueError(f"{name} is {json.dumps(value, default=str)}; it must be {allowed}{remedy}")


def _kinds(hint: Any) -> set[Any]:
    """The classes that a type hint names, without what is in brackets."""
    alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return {get_origin(kind) or kind for kind in alternatives}


def _set_type(action: argparse.Action, hint: Any, nullable: bool) -> None:
    """Let an option take JSON where its field takes a mapping, and `null` where it takes None."""
    kinds = _kinds(hint)
    if dict in kinds:
        action.type = _json
    if (nullable or NoneType in kinds) and callable(action.type):
        action.type = _or_null(action.type)
        if action.choices is not None:
            action.choices = [*action.choices, None]


def _json(text: str) -> Any:
    """A mapping, or the text itself, for it may name a file; named for argparse's "invalid JSON value"."""
    return json.loads(text) if text.lstrip().startswith("{") else text


_json.__name__ = "JSON"


def _or_null(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse_or_null(text: str) -> Any:
        return None if text == "null" else parse(text)

    parse_or_null.__name__ = getattr(parse, "__name__", "value")  # for errors
    return parse_or_null


def _closest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

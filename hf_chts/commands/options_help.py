"""--help of a command whose options are fields of dataclasses: each one's default, and its unit or type."""

import argparse
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

# What an option counts in, where its own help leaves that out
_UNITS = {
    name: unit
    for unit, names in {
        "SEQUENCES": "per_device_train_batch_size per_device_eval_batch_size",
        "EPOCHS": "num_train_epochs",
        "STEPS": "max_steps warmup_steps update_warmup_steps update_interval logging_steps eval_steps save_steps "
        "torch_empty_cache_steps",
        "EPOCHS_OR_STEPS": "eval_delay",
        "BATCHES": "eval_accumulation_steps gradient_accumulation_steps dataloader_prefetch_factor",
        "PROCESSES": "dataloader_num_workers workers",
        "CHECKPOINTS": "save_total_limit",
        "SECONDS": "ddp_timeout",
        "MEGABYTES": "ddp_bucket_cap_mb",
        "TOKENS": "block_size max_eval_tokens",
        "FRACTION": "validation_fraction sparsity initial_sparsity update_until sparsity_schedule_until drop_fraction",
    }.items()
    for name in names.split()
}
_TYPES = {"int": "N", "float": "X", "JSON": "JSON", "string_to_bool": "BOOL"}
_NOT_SHOWN = ("version", "local_rank", "do_train", "do_eval", "do_predict")  # they change nothing in a run
_SECRET = re.compile("(token|password|key)$")


class RunHelp(argparse.HelpFormatter):
    """One spelling of each option, in 100 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # --block_size and --block-size are the same option
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        values = "" if action.nargs == 0 else " " + self._format_args(action, str(action.metavar))
        return f"{', '.join(names)}{values}"

    def _expand_help(self, action: argparse.Action) -> str:
        return str(action.help).replace("%%", "%")  # texts have both, and none is a format


def describe(
    parser: argparse.ArgumentParser, fields: Mapping[str, dataclasses.Field[Any]], file: str, values: Mapping[str, Any]
) -> None:
    """Give each option a text with its default and a placeholder with its unit or type.

    Args:
        fields: the dataclass fields by name.
        file: name of the config file.
        values: what the file sets, shown beside the defaults.
    """
    for action in parser._actions:
        field = fields.get(action.dest)
        if field is None or action.help == argparse.SUPPRESS:
            continue
        if action.dest in _NOT_SHOWN or isinstance(action, argparse._StoreFalseAction):
            action.help = argparse.SUPPRESS
            continue
        otherwise = "CHOICE" if action.choices else _TYPES.get(getattr(action.type, "__name__", ""), "TEXT")
        action.metavar = str(field.metadata.get("metavar") or _UNITS.get(action.dest, otherwise))
        action.help = f"{str(field.metadata.get('help', '')).strip()} {_default(field, file, values)}".strip()


def _default(field: dataclasses.Field[Any], file: str, values: Mapping[str, Any]) -> str:
    parts = []
    if not re.search(r"\bdefault", str(field.metadata.get("help", "")), re.IGNORECASE):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        parts.append("no default" if made is dataclasses.MISSING else f"default: {_shown(made)}")
    if field.name in values and not _SECRET.search(field.name):
        parts.append(f"{file}: {_shown(values[field.name])}")
    return f"({'; '.join(parts)})" if parts else ""


def _shown(value: Any) -> str:
    value = getattr(value, "value", value)  # of an Enum
    if value is None or value in ([], ""):
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)

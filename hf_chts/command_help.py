"""--help of a command made of dataclasses: what each option is, its unit and its default."""

import argparse
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from hf_chts.methods import CHOICES

COLUMNS = 100

# What TrainingArguments counts in, where its own help leaves that out
_UNITS = {
    "per_device_train_batch_size": "SEQUENCES",
    "per_device_eval_batch_size": "SEQUENCES",
    "num_train_epochs": "EPOCHS",
    "max_steps": "STEPS",
    "warmup_steps": "STEPS",
    "update_warmup_steps": "STEPS",
    "update_interval": "STEPS",
    "logging_steps": "STEPS",
    "eval_steps": "STEPS",
    "save_steps": "STEPS",
    "torch_empty_cache_steps": "STEPS",
    "eval_delay": "EPOCHS_OR_STEPS",
    "eval_accumulation_steps": "BATCHES",
    "gradient_accumulation_steps": "BATCHES",
    "dataloader_prefetch_factor": "BATCHES",
    "dataloader_num_workers": "PROCESSES",
    "save_total_limit": "CHECKPOINTS",
    "ddp_timeout": "SECONDS",
    "ddp_bucket_cap_mb": "MEGABYTES",
    "block_size": "TOKENS",
    "max_eval_tokens": "TOKENS",
    "learning_rate": "RATE",
    "max_grad_norm": "NORM",
    "validation_fraction": "FRACTION",
    "sparsity": "FRACTION",
    "initial_sparsity": "FRACTION",
    "update_until": "FRACTION",
    "sparsity_schedule_until": "FRACTION",
    "drop_fraction": "FRACTION",
}
_NOT_SHOWN = ("version", "local_rank", "do_train", "do_eval", "do_predict")  # a run has no use for them
_SECRET = re.compile("(token|password|key)$")


class RunHelp(argparse.HelpFormatter):
    """One spelling of each option, in 100 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=COLUMNS)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        # --block_size and --block-size are one
        names = [n for n in action.option_strings if "-" not in n.lstrip("-")]
        values = "" if action.nargs == 0 else " " + self._format_args(action, str(action.metavar))
        return f"{', '.join(names)}{values}"

    def _expand_help(self, action: argparse.Action) -> str:
        return (action.help or "").replace("%%", "%")


def describe(parser: argparse.ArgumentParser, kinds: Iterable[Any], file: str, values: Mapping[str, Any]) -> None:
    """Give each option of `parser` a text with its default, and a placeholder that tells its unit or its type.

    Args:
        kinds: the dataclasses whose fields the options are.
        file: the config file's name, and `values` what it sets: these are named beside the defaults.
    """
    fields = {field.name: field for kind in kinds for field in dataclasses.fields(kind)}
    for action in parser._actions:
        field = fields.get(action.dest)
        if field is None:
            continue
        if action.dest in _NOT_SHOWN or isinstance(action, argparse._StoreFalseAction):
            action.help = argparse.SUPPRESS
            continue
        action.metavar = str(field.metadata.get("metavar") or _placeholder(action))
        action.help = f"{str(field.metadata.get('help', '')).strip()} {_default(field, file, values)}".strip()


def unit(name: str, kind: str = "") -> str:
    """The placeholder of an option `name` whose type is called `kind`: what it counts in, or what it is."""
    if name in _UNITS:
        return _UNITS[name]
    if name in CHOICES:
        return "CHOICE"
    if "bool" in kind:
        return "BOOL"
    return {"int": "N", "float": "X"}.get(kind, "TEXT")


def _placeholder(action: argparse.Action) -> str:
    if action.choices or getattr(action.type, "__name__", "") == "<lambda>":
        return "CHOICE"
    return unit(action.dest, getattr(action.type, "__name__", ""))


def _default(field: Any, file: str, values: Mapping[str, Any]) -> str:
    parts = []
    text = str(field.metadata.get("help", ""))
    if not re.search(r"\bdefault", text, re.IGNORECASE):
        value = field.default
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        parts.append(f"default: {_shown(value)}")
    if field.name in values and not _SECRET.search(field.name):
        parts.append(f"{file}: {_shown(values[field.name])}")
    return f"({'; '.join(parts)})" if parts else ""


def _shown(value: Any) -> str:
    value = getattr(value, "value", value)  # of an Enum
    if value is None or value is dataclasses.MISSING or value in ([], ""):
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)

"""--help of every command: each option with its default, and the unit or type of what it takes."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from hf_chts import SparseTrainingArguments, SparsityConfig
from hf_chts.commands.app import app, main
from hf_chts.commands.options import parse_run
from hf_chts.data import DataArguments
from hf_chts.model_arguments import ModelArguments

ROOT = Path(__file__).parents[1]
KINDS = (ModelArguments, DataArguments, SparsityConfig, SparseTrainingArguments)
NOT_SHOWN = {"version", "local_rank", "do_train", "do_eval", "do_predict"}


def options_of(text):
    """Option → (what it takes, what is said about it), from argparse's layout."""
    options = {}
    for match in re.finditer(r"^  (?:-\w, )?--(\w+)(?: ([^\n]*?))?(?:\n|  +)(.*?)(?=^  -|^\w|\Z)", text, re.M | re.S):
        options[match[1]] = (match[2] or "", " ".join(match[3].split()))
    return options


def train_help(capsys, config):
    with pytest.raises(SystemExit) as end:
        parse_run(KINDS, ["--help"], program="train", default_config=config, description="A run.")
    assert end.value.code == 0
    return capsys.readouterr().out


def test_train(capsys):
    text = train_help(capsys, ROOT / "configs/demo.yaml")
    assert max(map(len, text.splitlines())) <= 100
    options = options_of(text)
    fields = {field.name for kind in KINDS for field in dataclasses.fields(kind) if field.init}
    assert options.keys() == (fields - NOT_SHOWN) | {"help", "config"}
    for name, (takes, said) in options.items():
        if name != "help":
            assert re.search(r"\bdefault", said, re.IGNORECASE), name
            assert re.fullmatch(r"\[?[A-Z_]+\]?( \[[A-Z_]+ \.\.\.\])?", takes), (name, takes)
    assert options["block_size"] == (
        "TOKENS",
        "Length of a training sequence, in tokens. Default: 256. (demo.yaml: 256)",
    )
    assert options["learning_rate"][1].endswith("(default: 5e-05; demo.yaml: 0.003)")
    assert options["bf16"][0] == "[BOOL]"
    assert options["lr_scheduler_kwargs"][0] == "JSON"
    assert "~20% slower" in options["activation_checkpointing"][1]  # % is not taken for a format


def test_secrets_of_a_config_are_not_shown(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("hub_token: hf_secret\nmethod: set\n")
    text = train_help(capsys, tmp_path / "run.yaml")
    assert "hf_secret" not in text
    assert "run.yaml: set)" in " ".join(text.split())


def test_every_option_has_a_text_and_a_default():
    for name, command in get_command(app).commands.items():
        assert command.help or name == "evaluate"
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, (name, parameter.name)
                assert parameter.default is not None or parameter.show_default, (name, parameter.name)


def test_prepare(capsys):
    main(["prepare", "--help"])
    options = options_of(capsys.readouterr().out)
    assert {"config", "out", "workers", "seed", "model", "dataset", "validation_fraction"} <= options.keys()
    assert not {"block_size", "streaming", "export", "method"} & options.keys()  # which change no token


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\nfrom hf_chts.commands.app import main\nmain(['--help'])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'huggingface_hub')))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f" {name} " in shown for name in get_command(app).commands)

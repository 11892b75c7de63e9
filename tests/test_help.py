"""--help: every option of every command with its default, and the unit or the type of what it takes."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hf_chts.command_line import parse_run

from hf_chts import SparseTrainingArguments, SparsityConfig
from hf_chts.__main__ import COMMANDS, main
from hf_chts.data import DataArguments
from hf_chts.model_arguments import ModelArguments

ROOT = Path(__file__).parents[1]
KINDS = (ModelArguments, DataArguments, SparsityConfig, SparseTrainingArguments)
NOT_SHOWN = {"version", "local_rank", "do_train", "do_eval", "do_predict"}


def help_of(call, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        call()
    assert stopped.value.code == 0
    return capsys.readouterr().out


def options_of(text):
    """Option → (what it takes, what is said of it), of argparse's layout."""
    options = {}
    for match in re.finditer(r"^  (?:-\w, )?--(\w+)(?: ([^\n]*?))?(?:\n|  +)(.*?)(?=^  -|^\w|\Z)", text, re.M | re.S):
        options[match[1]] = (match[2] or "", " ".join(match[3].split()))
    return options


def run_help(capsys, monkeypatch, config):
    def call():
        parse_run(KINDS, ["--help"], default_config=config, description="A run.")

    return help_of(call, capsys, monkeypatch)


def test_train_llama(capsys, monkeypatch):
    text = run_help(capsys, monkeypatch, ROOT / "configs/demo.yaml")
    assert max(map(len, text.splitlines())) <= 100
    options = options_of(text)
    fields = {field.name for kind in KINDS for field in dataclasses.fields(kind) if field.init}
    assert options.keys() == (fields - NOT_SHOWN) | {"help", "config"}
    for name, (takes, said) in options.items():
        if name != "help":
            assert re.search(r"\bdefault", said, re.IGNORECASE), name
            assert re.fullmatch(r"\[?[A-Z_]+\]?( \[[A-Z_]+ \.\.\.\])?", takes), (name, takes)
    assert options["block_size"] == ("TOKENS", "Length of a training sequence, in tokens. Default: 256. (configs/demo.yaml: 256)")  # fmt: skip  # noqa: E501
    assert options["learning_rate"][1].endswith("(default: 5e-05; configs/demo.yaml: 0.003)")
    assert options["ddp_timeout"][0] == "SECONDS"
    assert options["bf16"] == ("[BOOL]", options["bf16"][1])
    assert "max_eval_tokens" in options
    assert options["max_eval_tokens"][1].endswith("(configs/demo.yaml: 65536)")
    assert "~20% slower" in options["activation_checkpointing"][1]  # and no percent sign is taken for a format


def test_secrets_of_a_config_are_not_shown(capsys, monkeypatch, tmp_path):
    (tmp_path / "run.yaml").write_text("hub_token: hf_secret\nmethod: set\n")
    text = run_help(capsys, monkeypatch, tmp_path / "run.yaml")
    assert "hf_secret" not in text
    assert "run.yaml: set)" in " ".join(text.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, capsys, monkeypatch):
    text = help_of(lambda: main([command, "--help"]), capsys, monkeypatch)
    assert max(map(len, text.splitlines())) <= 100
    options = options_of(text)
    assert "help" in options
    for name, (_, said) in options.items():
        assert name == "help" or re.search(r"\bdefault", said, re.IGNORECASE), name


def test_eval_zero_shot():
    shown = subprocess.run(
        [sys.executable, str(ROOT / "eval_zero_shot.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "100"},
    ).stdout
    options = options_of(shown)
    assert {"suite", "limit", "num_fewshot", "batch_size", "output"} <= options.keys()
    for name, (_, said) in options.items():
        assert name == "help" or re.search(r"\bdefault", said, re.IGNORECASE), name

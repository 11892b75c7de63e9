"""The command line."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_chts.evaluation import SUITES, write_embedded_suite

SCRIPT = Path(__file__).parents[2] / "eval_zero_shot.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the script in this process; returns its exit status or message, and what it printed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "0"))  # the script changes it

    def run_script(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            return end.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return run_script


def test_one_directory(run, saved_models, tmp_path):
    output = tmp_path / "results" / "one.json"
    code, printed = run(saved_models[0], "--limit", 8, "--output", output)
    assert code == 0
    (result,) = json.loads(output.read_text())
    lines = printed.rstrip().split("\n")
    assert lines[-1] == f"Results: {output}"
    assert max(map(len, lines[:-1])) <= 100
    bits = result["tasks"]["embedded_bits_per_byte"]["bits_per_byte"]
    assert any("bits_per_byte" in line and f"{bits:.4f}" in line for line in lines)
    assert result["config"]["limit"] == 8
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_two_directories_and_a_task_without_its_data(saved_models, tmp_path):
    """In a process of its own: huggingface_hub reads HF_HUB_OFFLINE when it is imported, and hash() is salted."""
    output = tmp_path / "two.json"
    options = ["--suite", "embedded,perplexity", "--limit", "8", "--batch_size", "4", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, saved_models), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONHASHSEED": "7"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert [result["model"] for result in results] == [str(directory) for directory in saved_models]
    header, _, *rows = done.stdout.split("\n")
    assert header.split() == ["task", "metric", "chance", "first", "second"]
    (bits,) = [row for row in rows if "bits_per_byte  " in row and "byte_perplexity" not in row]
    figures = [result["tasks"]["embedded_bits_per_byte"]["bits_per_byte"] for result in results]
    assert bits.split()[-2:] == [f"{figure:.4f}" for figure in figures]
    assert figures[0] != figures[1]
    assert "Skipped wikitext: its data is not cached" in done.stdout
    assert all(list(result["skipped"]) == ["wikitext"] for result in results)
    # the tasks have the digest of their data in their versions: both processes wrote the same
    for task in write_embedded_suite(tmp_path / "suite"):
        config = yaml.safe_load((tmp_path / "suite" / f"{task}.yaml").read_text())
        assert {result["versions"]["tasks"][task] for result in results} == {config["metadata"]["version"]}


def test_help_names_every_suite_and_default(run):
    code, printed = run("--help")
    assert code == 0
    assert all(suite in printed for suite in SUITES)
    options = [part.split()[0] for part in printed.split("\n  --")[1:]]
    assert len(options) == 10
    assert printed.count("default:") == len(options)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{missing}"], "no directory"),
        (["{first}", "{missing}"], "no directory"),
        (["{first}", "--limit", "0"], "limit=0"),
        (["{first}", "--suite", "embedded,,"], "empty name"),
        (["{first}", "--output", "{folder}"], "is a directory"),
    ],
)
def test_bad_input_is_one_line_and_no_results(run, saved_models, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    places = {"missing": tmp_path / "missing", "first": saved_models[0], "folder": tmp_path}
    code, printed = run(*(argument.format(**places) for argument in arguments))
    assert isinstance(code, str)  # sys.exit prints it and ends with status 1
    assert code.startswith("eval_zero_shot.py: error: ")
    assert named in code
    assert "\n" not in code
    assert printed == ""
    assert list(tmp_path.iterdir()) == []

"""The command line."""

import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import yaml
from made_data import write_task

import hf_chts.evaluation
from hf_chts import SparsityConfig, export_sparse, sparsify
from hf_chts.checkpoint.seal import seal
from hf_chts.evaluation import SUITES, check_model, evaluate_zero_shot, write_embedded_suite, write_results

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
    assert lines[-1] == f"Results: {output}, one.md, one.png"
    assert sorted(path.name for path in output.parent.iterdir()) == ["one.json", "one.md", "one.png"]
    assert max(map(len, lines[:-1])) <= 100
    bits = result["tasks"]["embedded_bits_per_byte"]["bits_per_byte"]
    assert any("bits_per_byte" in line and f"{bits:.4f}" in line for line in lines)
    assert result["config"]["limit"] == 8
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_packed_weights(run, tmp_path, byte_tokenizer, tiny_llama):
    model, results = tiny_llama(3), []
    sparsify(model, SparsityConfig("set", sparsity=0.5))
    for packed in (True, False):
        export = export_sparse(model, tmp_path / f"export_{packed}", packed=packed, tokenizer=byte_tokenizer)
        for compute in ("dense", "sparse"):
            output = tmp_path / "results.json"
            assert run(export, "--limit", 8, "--output", output, "--compute", compute)[0] == 0
            results += json.loads(output.read_text())
    for result, compute in zip(results, ("dense", "sparse") * 2, strict=True):
        assert result["config"]["compute"] == compute
        assert result["config"]["parameters"] == model.num_parameters()
        for task, scores in results[0]["tasks"].items():
            assert result["tasks"][task] == pytest.approx(scores, rel=1e-5, abs=1e-5)
    assert run(export, "--compute", "fast")[0] == 2


def test_packed_weights_are_for_one_process_and_for_directories(tiny_llama, byte_tokenizer, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="compute='sparse' are for models loaded from"):
        evaluate_zero_shot(tiny_llama(0), tokenizer=byte_tokenizer, compute="sparse")
    with pytest.raises(ValueError, match="compute is 'fast'"):
        evaluate_zero_shot(tmp_path, compute="fast")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="evaluates in one process"):
        evaluate_zero_shot(tmp_path, compute="sparse")


def cache(home, name, directory):
    """Put a directory where a download of the Hub id `name` would be."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(directory, repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")


@pytest.mark.slow
def test_hub_ids_plain_and_packed_and_a_task_without_its_data(saved_models, tiny_llama, byte_tokenizer, tmp_path):
    """In a process of its own: huggingface_hub reads HF_HUB_OFFLINE when it is imported, and hash() is salted."""
    model = tiny_llama(0)
    sparsify(model, SparsityConfig(method="set", sparsity=0.5))
    for name, packed in (("plain", False), ("packed", True)):
        export_sparse(model, tmp_path / name, tokenizer=byte_tokenizer, packed=packed)
        cache(tmp_path / "home", f"org/{name}", tmp_path / name)
    output = tmp_path / "three.json"
    models = ["org/plain", "org/packed", str(saved_models[1])]
    options = ["--suite", "embedded,perplexity", "--limit", "8", "--batch_size", "4", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *models, *options, "--baseline", models[2]],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONHASHSEED": "7"},
    )
    assert done.returncode == 3, done.stderr
    results = json.loads(output.read_text())
    assert [result["model"] for result in results] == models
    assert results[0]["tasks"] == results[1]["tasks"] != results[2]["tasks"]
    assert done.stdout.startswith("task ")
    bits = [result["tasks"]["embedded_bits_per_byte"]["bits_per_byte"] for result in results]
    (found,) = [result["difference"]["tasks"]["embedded_bits_per_byte"]["bits_per_byte"] for result in results[1:2]]
    assert found["value"] == pytest.approx(bits[1] - bits[2])
    assert found["paired"] is True
    assert all(f"{value:.4f}" in done.stdout for value in bits)
    notes = " ".join(done.stdout.split())
    assert "Skipped wikitext: its data, EleutherAI/wikitext_document_level wikitext-2-raw-v1, is not cached" in notes
    assert "--task_data DIR with DIR/wikitext/test.jsonl" in notes
    assert all(list(result["skipped"]) == ["wikitext"] for result in results)
    for text in ("Model 2 of 3: org/packed", "embedded_next_line (2 of 2 tasks)"):
        assert text in done.stderr
    # the tasks have the digest of their data in their versions: both processes wrote the same
    for task in write_embedded_suite(tmp_path / "suite"):
        config = yaml.safe_load((tmp_path / "suite" / f"{task}.yaml").read_text())
        assert {result["versions"]["tasks"][task] for result in results} == {config["metadata"]["version"]}


def test_a_model_that_does_not_load_does_not_cost_the_others(run, saved_models, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(saved_models[0], broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    output = tmp_path / "results.json"
    options = ["--suite", "embedded_next_line", "--limit", 2, "--output", output]
    code, printed = run(saved_models[0], broken, saved_models[1], "--baseline", broken, *options)
    assert code == 3
    assert f"Not evaluated: {broken}: " in printed
    first, second = json.loads(output.read_text())
    assert (first["model"], second["model"]) == tuple(map(str, saved_models))
    assert second["difference"]["baseline"] == str(saved_models[0])  # as the one that was named is not there
    code, printed = run(broken, broken, *options)
    assert code.startswith("eval_zero_shot.py: no model could be evaluated.")
    assert len(json.loads(output.read_text())) == 2


def test_results_are_there_after_each_model(run, saved_models, tmp_path, monkeypatch):
    def killed(*arguments, **options):
        if arguments[0] == str(saved_models[1]):
            raise SystemExit("killed")
        return evaluate(*arguments, **options)

    evaluate = hf_chts.evaluation.evaluate_zero_shot
    monkeypatch.setattr(hf_chts.evaluation, "evaluate_zero_shot", killed)
    output = tmp_path / "results.json"
    code, _ = run(*saved_models, "--suite", "embedded_next_line", "--limit", 2, "--output", output)
    assert code == "killed"
    assert [result["model"] for result in json.loads(output.read_text())] == [str(saved_models[0])]
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "results.png"}


NEXT_LINE = ("--suite", "embedded_next_line", "--limit", 2)


def broken(*arguments, **options):
    raise RuntimeError("broken on the way")


def no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "hf_chts.evaluation.figure", raising=False)


# steps after the evaluation that can fail, and what is printed then
FAILURES = {
    "matplotlib is missing": (no_matplotlib, "matplotlib"),
    "the figure": (
        lambda patch: patch.setattr("hf_chts.evaluation.figure.results_figure", broken),
        "broken on the way",
    ),
    "report and table": (
        lambda patch: [
            patch.setattr(f"hf_chts.evaluation.{place}", broken)
            for place in ("write_report", "results_table", "result_files.results_table")
        ],
        "broken on the way",
    ),
    "baselines and errors": (lambda patch: patch.setattr("hf_chts.evaluation.task_run.score_samples", broken), ""),
}


@pytest.fixture(scope="module")
def evaluated(saved_models):
    return [evaluate_zero_shot(model, "embedded_next_line", limit=2) for model in saved_models]


@pytest.mark.parametrize("step", FAILURES)
def test_no_failure_loses_a_result_or_the_next_model(run, saved_models, evaluated, tmp_path, monkeypatch, step):
    output = tmp_path / "results.json"
    breaks, said = FAILURES[step]
    breaks(monkeypatch)
    code, printed = run(*saved_models, *NEXT_LINE, "--output", output)
    assert code == 0
    assert said in printed
    assert str(output) in printed
    found = json.loads(output.read_text())
    assert [result["model"] for result in found] == list(map(str, saved_models))
    for before, after in zip(evaluated, found, strict=True):
        for metric in ("acc", "acc_norm"):  # the harness's own
            assert after["tasks"]["embedded_next_line"][metric] == before["tasks"]["embedded_next_line"][metric]
        assert after["versions"] == before["versions"]
        assert after["samples"] == {"embedded_next_line": 2}


def test_results_that_cannot_be_written_are_printed(run, saved_models, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    evaluated = []
    evaluate = hf_chts.evaluation.evaluate_zero_shot
    monkeypatch.setattr(
        hf_chts.evaluation, "evaluate_zero_shot", lambda *a, **o: evaluated.append(a[0]) or evaluate(*a, **o)
    )
    monkeypatch.setattr(hf_chts.evaluation.result_files, "write_whole", full)
    code, printed = run(*saved_models, *NEXT_LINE, "--output", tmp_path / "results.json")
    assert evaluated == list(map(str, saved_models))
    assert "No space left" in code
    results = json.loads(printed[printed.index("\n[") :])
    assert [result["model"] for result in results] == list(map(str, saved_models))
    assert all("acc" in result["tasks"]["embedded_next_line"] for result in results)


def test_what_json_has_no_word_for_is_written_all_the_same(tmp_path):
    numbers = {"acc": np.float32(0.5), "f1": np.float64("nan"), "seen": np.int64(7)}
    result = {"model": "a", "tasks": {"t": numbers}, "versions": {"tasks": {"t": date(2024, 5, 17)}}}
    write_results([result], tmp_path / "results.json")
    (found,) = json.loads((tmp_path / "results.json").read_text())
    assert found["tasks"]["t"] == {"acc": 0.5, "f1": None, "seen": 7}
    assert found["versions"]["tasks"]["t"] == "2024-05-17"


def test_a_console_without_unicode(run, saved_models, tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="surrogateescape", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)  # as LANG=C has it
    code, _ = run(saved_models[0], *NEXT_LINE, "--output", tmp_path / "results.json")
    assert code == 0
    printed = stream.buffer.getvalue().decode("ascii")
    assert "embedded_next_line" in printed
    assert "+-" in printed  # a value and its error
    assert "?" not in printed


def test_local_task_data(run, saved_models, tmp_path):
    write_task(tmp_path / "data", "sst2", 9)
    options = ["--task_data", tmp_path / "data", "--output", tmp_path / "results.json", "--suite", "sst2"]
    code, printed = run(saved_models[0], *options)
    assert code == 0
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert result["data"] == {"sst2": str(tmp_path / "data" / "sst2")}
    assert result["samples"] == {"sst2": 9}
    assert [line.split()[:2] for line in printed.split("\n")[2:5]] == [
        ["sst2", "acc"],
        ["mcc", "0.0000"],
        ["balanced_acc", "0.5000"],
    ]


@pytest.fixture
def checkpoint(saved_models, tmp_path):
    """A checkpoint of a run, with what only a resume reads."""
    place = tmp_path / "run/checkpoint-3"
    shutil.copytree(saved_models[0], place)
    (place / "optimizer.pt").write_bytes(bytes(100))
    (place / "trainer_state.json").write_text("{}")
    seal(place, 3)
    return place


def damage(place):
    contents = bytearray((place / "model.safetensors").read_bytes())
    contents[-1] ^= 1  # of a weight
    (place / "model.safetensors").write_bytes(contents)


def unseal(place):
    (place / "checkpoint_seal.json").unlink()
    for name in ("masks.safetensors", "topology_history.json"):  # of a sparse run
        (place / name).write_bytes(b"")


def second_of_dense(place):
    shutil.copytree(place, place.parent / "checkpoint-2")  # which was written whole
    (place / "checkpoint_seal.json").unlink()


def first_of_dense(place):
    (place.parent / "run_identity.json").write_text("{}")
    (place / "checkpoint_seal.json").unlink()


# damage to a checkpoint, and what the error says
NOT_WHOLE = {
    "damaged": (damage, "model.safetensors is damaged"),
    "a file is missing": (
        lambda place: (place / "generation_config.json").unlink(),
        "generation_config.json is missing",
    ),
    "another file": (lambda place: (place / "config.json").write_text("{}"), "config.json has 2 bytes"),
    "no seal": (unseal, "checkpoint_seal.json is missing"),
    "no seal, dense": (second_of_dense, "checkpoint_seal.json is missing"),
    "no seal, the first of a dense run": (first_of_dense, "checkpoint_seal.json is missing"),
    "a damaged seal": (
        lambda place: (place / "checkpoint_seal.json").write_text("[]"),
        "checkpoint_seal.json cannot be",
    ),
}


@pytest.mark.parametrize("reason", NOT_WHOLE)
def test_a_checkpoint_that_is_not_whole_is_refused(run, checkpoint, saved_models, tmp_path, monkeypatch, reason):
    monkeypatch.chdir(checkpoint)
    change, named = NOT_WHOLE[reason]
    change(checkpoint)
    for name in (checkpoint, "."):
        code, printed = run(saved_models[1], name, "--output", tmp_path / "results.json")
        assert code.startswith("eval_zero_shot.py: ")
        assert named in code
        assert "--unsealed" in code
        assert "\n" not in code
        assert printed == ""
    assert not (tmp_path / "results.json").exists()
    with pytest.raises((FileNotFoundError, ValueError), match=named):
        evaluate_zero_shot(checkpoint)


def test_a_damaged_checkpoint_on_request(run, checkpoint, tmp_path):
    damage(checkpoint)
    code, _ = run(checkpoint, *NEXT_LINE, "--unsealed", "--output", tmp_path / "results.json")
    assert code == 0
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert result["samples"] == {"embedded_next_line": 2}


def test_complete_checkpoints_and_models_of_other_origin_are_evaluated(checkpoint, saved_models, tmp_path):
    assert check_model(checkpoint) == str(checkpoint)
    # what only a resume reads may be gone
    (checkpoint / "optimizer.pt").unlink()
    assert check_model(checkpoint) == str(checkpoint)
    # a plain Trainer's, and an export with its masks
    plain, export = tmp_path / "plain/checkpoint-3", tmp_path / "run/export"
    for place in (plain, export):
        shutil.copytree(saved_models[0], place)
    (plain / "trainer_state.json").write_text("{}")
    (export / "masks.safetensors").write_bytes(b"")
    assert check_model(plain) == str(plain)
    assert check_model(export) == str(export)


def test_help_names_every_suite_and_exit_status(run):
    code, printed = run("--help")
    assert code == 0
    assert all(suite in printed for suite in SUITES)
    assert "3, some tasks or models were left out" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{missing}"], "no directory"),
        (["{first}", "{missing}"], "no directory"),
        (["{first}", "--limit", "0"], "limit=0"),
        (["{first}", "--output", "{folder}"], "is a directory"),
        (["{first}", "--output", "{file}/below/results.json"], "cannot be written to"),
        (["{first}", "--output", "/proc/nowhere/results.json"], "cannot be written to"),
        (["{first}", "--output", "{folder}/results.md"], "is for the JSON file"),
        (["{first}", "--baseline", "other"], "baseline='other'"),
        (["{first}", "--task_data", "{missing}"], "is not a directory"),
    ],
)
def test_bad_input_is_one_line_and_no_results(run, saved_models, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    file = saved_models[0] / "config.json"
    places = {"missing": tmp_path / "missing", "first": saved_models[0], "folder": tmp_path, "file": file}
    code, printed = run(*(argument.format(**places) for argument in arguments))
    assert isinstance(code, str)  # sys.exit prints it and ends with status 1
    assert code.startswith("eval_zero_shot.py: ")
    assert named in code
    assert "\n" not in code
    assert printed == ""
    assert list(tmp_path.iterdir()) == []

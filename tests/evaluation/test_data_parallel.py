"""Documents shared by two processes on the CPU, through the command."""

import contextlib
import json
import os
import runpy
import subprocess
import sys

import pytest
from launching import BIN, ROOT

from hf_chts.evaluation.harness import _merge


def test_what_ranks_gather_is_in_the_order_of_the_documents():
    # documents are dealt out in turns: rank 0 has 0, 3, 6, rank 1 has 1, 4, and rank 2 has 2, 5
    gathered = [{"task": {("acc", "none"): list(range(rank, 7, 3))}, "other": [rank]} for rank in range(3)]
    assert _merge(gathered) == {"task": {("acc", "none"): list(range(7))}, "other": [0, 1, 2]}


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_have_the_results_of_one(tmp_path, saved_models, monkeypatch, capsys):
    script = str(ROOT / "eval_zero_shot.py")
    # rank 0 has one document more than rank 1; 160 tokens are less than most questions have
    options = [str(saved_models[0]), "--limit", "21", "--max_length", "160", "--batch_size", "1", "--device", "cpu"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which the script sets
    monkeypatch.setattr(sys, "argv", [script, *options, "--output", str(tmp_path / "one.json")])
    with contextlib.suppress(SystemExit):  # with status 0: what follows needs the results
        runpy.run_path(script, run_name="__main__")
    alone = capsys.readouterr().out
    launch = [BIN / "accelerate", "launch", "--config_file", ROOT / "configs/accelerate/cpu_ddp.yaml"]
    command = [*map(str, launch), "--main_process_port", "0", script, *options, "--output", str(tmp_path / "two.json")]
    # for accelerate's look at DeepSpeed: the CPU even where there is a GPU
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    shared = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert shared.returncode == 0, shared.stderr[-8000:]
    (one,), (two,) = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert (one["config"].pop("processes"), two["config"].pop("processes")) == (1, 2)
    for result in (one, two):
        del result["seconds"], result["config"]["device"]
    # all figures to the last digit: values, standard errors, how many contexts were cut
    assert two == one
    assert one["truncated_requests"] > 0
    assert shared.stdout.replace("two.", "one.") == alone

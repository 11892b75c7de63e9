"""Runs that are ended with SIGKILL, during a save too, and go on as if nothing had been."""

import json
import subprocess
import sys
from pathlib import Path

from cases import STEPS, same_weights, trainer, weights
from tiny import tiny_llama


def test_killed_runs_end_as_uninterrupted_ones():
    command = [sys.executable, str(Path(__file__).with_name("kill_trials.py")), "--trials", "2", "--cases", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    *trials, figures = map(json.loads, result.stdout.splitlines())
    assert all(trial["equal"] for trial in trials), result.stdout
    assert result.returncode == 0, result.stderr[-4000:]
    assert figures["trials"] == figures["equal"] == 2
    assert figures["half_written"] >= 1  # in the first trial


def test_a_finished_run_that_is_resumed_trains_no_step_more(tmp_path):
    # killed between its last save and its end, for example
    whole = trainer(tmp_path)
    whole.train()
    again = trainer(tmp_path, model=tiny_llama(seed=5))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS
    assert same_weights(weights(again), weights(whole))

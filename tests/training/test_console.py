"""What a run prints: a line a log, a line an update, 100 columns."""

import io
import re

import pytest
from cases import INTERVAL, STEPS, arguments, case_config
from tiny import random_blocks, tiny_llama
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback

from hf_chts import SparseTrainer
from hf_chts.training import console
from hf_chts.training.console import ConsoleCallback, log_line, update_line

FIGURES = {
    "sparsity": 0.8996,
    "itop": 0.5386,
    "overlap": 0.2065,
    "active_neurons": 0.9961,
    "links_removed": 324_625,
    "links_regrown": 9_940,
    "topology_seconds": 0.4201,
}


def test_an_update_is_one_line():
    line = update_line(100, FIGURES)
    assert line == "   100  90.0% sparse  −325k +9.9k  overlap 21%  ITOP 0.54  active 99.6%  0.4 s"
    with_losses = update_line(100, FIGURES | {"loss_before_update": 3.25, "loss_after_update": 3.262})
    assert "  loss +0.012  " in with_losses
    assert "  loss −0.250  " in update_line(100, FIGURES | {"loss_before_update": 3.25, "loss_after_update": 3.0})


@pytest.mark.parametrize("links", [0, 999, 1000, 999_999, 9_999_999, 6_000_000_000])
def test_the_longest_update_fits(links):
    figures = FIGURES | {"softness": 0.899, "loss_before_update": 9.0, "loss_after_update": 8.5, "itop": 1.0}
    figures |= {"overlap": 1.0, "topology_seconds": 999.9, "links_removed": links, "links_regrown": links}
    assert len(update_line(999_999, figures)) <= 100


def test_logs_of_the_trainer_and_of_others():
    assert (
        log_line(20, {"loss": 4.56789, "grad_norm": 1.2345, "learning_rate": 3e-3, "epoch": 0.1})
        == "    20  loss 4.5679  gradient norm 1.23  learning rate 3.00e-03"
    )
    ours = {f"metric_{n}": n / 7 for n in range(9)}
    lines = log_line(20, {"eval_loss": 2.0, "eval_runtime": 1.0, "eval_steps_per_second": 3.0, **ours}).splitlines()
    assert lines[0].startswith("    20  validation: loss 2.0000  seconds 1.0  metric_0 0")
    assert len(lines) > 1
    assert max(map(len, lines)) <= 100
    assert all(line.startswith("        ") for line in lines[1:])
    text = " ".join(lines)
    assert all(f"metric_{n} {n / 7:.4g}" in text for n in range(9))
    assert "steps_per_second" not in text


def run_and_read(tmp_path, monkeypatch, capsys, **options):
    run = SparseTrainer(
        model=tiny_llama(),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=6, logging_steps=4, save_strategy="no", **options),
        sparsity=case_config("chtss"),
        train_dataset=random_blocks(),
        eval_dataset=random_blocks(8),
    )
    run.train()
    captured = capsys.readouterr()
    # DeepSpeed's own, at its import, where no accelerator is: train_llama.py tells it
    lines = [line for line in captured.out.splitlines() if "real_accelerator.py" not in line]
    return run, lines, captured.err


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_run_says_in_one_line_per_update_what_happened(tmp_path, monkeypatch, capsys, disable_tqdm):
    run, lines, errors = run_and_read(tmp_path, monkeypatch, capsys, disable_tqdm=disable_tqdm)
    assert max(map(len, lines)) <= 100
    updates = [line for line in lines if "sparse  −" in line]
    assert [int(line.split()[0]) for line in updates] == [entry["step"] for entry in run.topology.history]
    for line, entry in zip(updates, run.topology.history, strict=True):
        assert f"  {entry['sparsity']:.1%} sparse  −" in line
        assert bool(re.search(r"loss [+−]\d", line)) == (entry["step"] < STEPS)
    assert len(updates) == 18 // INTERVAL  # the topology rests in the last quarter
    assert sum(" validation: " in line for line in lines) == STEPS // 6
    assert sum(" done: " in line for line in lines) == 1
    assert "it/s" not in errors  # stderr is no terminal here
    assert not any(line.startswith("{") for line in lines)


def test_bars_are_drawn_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    state = TrainerState(max_steps=3, is_world_process_zero=True)
    for bars, expected in ((True, True), (False, False)):
        stream = Terminal()
        monkeypatch.setattr(console.sys, "stderr", stream)
        callback = ConsoleCallback(bars=bars)
        callback.on_train_begin(None, state, None)
        state.global_step = 3
        callback.on_step_end(None, state, None)
        callback.on_train_end(None, state, None)
        assert ("3/3" in stream.getvalue()) is expected
        state.global_step = 0


def test_only_the_trainers_own_callbacks_are_replaced(tmp_path):
    class Mine(ProgressCallback):
        pass

    class Other(TrainerCallback):
        pass

    def kinds(trainer_class, **options):
        run = trainer_class(
            model=tiny_llama(), args=arguments(tmp_path), train_dataset=random_blocks(), callbacks=[Mine, Other]
        )
        return [type(callback) for callback in run.callback_handler.callbacks]

    plain, ours = kinds(Trainer), kinds(SparseTrainer)
    assert PrinterCallback in plain or ProgressCallback in plain
    assert not {PrinterCallback, ProgressCallback} & set(ours)
    assert {ConsoleCallback, Mine, Other} <= set(ours)

"""What a run prints: a line a log, a line an update, 100 columns."""

import io
import re

import pytest
from cases import INTERVAL, STEPS, arguments, case_config, trainer
from tiny import random_blocks, tiny_llama
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback

from hf_chts import SparseTrainer
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


def test_figures_of_others_go_on_further_lines():
    lines = log_line(20, timed("eval", loss=2.0) | {f"metric_{n}": n / 7 for n in range(9)}).splitlines()
    assert lines[0].startswith("    20  validation: loss 2.0000  seconds 2.0  metric_0 0")
    assert len(lines) > 1
    assert max(map(len, lines)) <= 100
    assert all(line.startswith("        ") for line in lines[1:])
    assert all(f"metric_{n} {n / 7:.4g}" in " ".join(lines) for n in range(9))


RUNTIME = {"runtime": 2.0, "samples_per_second": 4.0, "steps_per_second": 1.0}


def timed(name, **figures):
    """What the Trainer logs of an evaluation under this name."""
    return {f"{name}_{key}": value for key, value in (figures | RUNTIME).items()} | {"epoch": 0.5}


STEP = {"loss": 4.5, "grad_norm": 1.25, "learning_rate": 3e-3, "epoch": 0.1}
COUNTED = {"num_input_tokens_seen": 640, "train_runtime": 3.5, "train_tokens_per_second": 182.8}
END = {"train_runtime": 3.5, "train_samples_per_second": 8.0, "train_steps_per_second": 2.0, "total_flos": 1e9}
END |= {"train_loss": 3.25, "epoch": 1.0}


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (STEP | COUNTED, "loss 4.5000  gradient norm 1.25  learning rate 3.00e-03  tokens per second 183"),
        # its clock had not moved since the begin: no rate
        (STEP | {"num_input_tokens_seen": 640, "train_runtime": 0.0}, "loss 4.5000  gradient norm 1.25"),
        (END, "done: mean loss 3.2500  seconds 3.5  sequences per second 8.00  steps per second 2.000"),
        (END | COUNTED, "done: mean loss 3.2500  seconds 3.5  sequences per second 8.00"),
        (timed("eval", loss=2.0, bits_per_byte=1.5), "validation: loss 2.0000  bits per byte 1.5000  seconds 2.0"),
        (timed("eval", loss=2.0) | {"num_input_tokens_seen": 640}, "validation: loss 2.0000  seconds 2.0"),
        (timed("eval_books", loss=2.0), "validation books: loss 2.0000  seconds 2.0"),
        (timed("test", loss=2.0), "test: loss 2.0000  seconds 2.0"),
        (timed("train", loss=2.0), "train: loss 2.0000  seconds 2.0"),  # evaluated on the training data
        # a figure of the user's that is called as a time of the Trainer's is
        (timed("eval", loss=2.0, model_runtime=0.5), "validation: loss 2.0000  seconds 2.0  eval_model_runtime 0.5"),
        ({"eval_loss": 2.0, "epoch": 1.0}, "validation: loss 2.0000"),
        # figures of the user's in a log of training steps, or in one of their own
        (STEP | {"eval_mine": 7.5, "train_mine": 8.5}, "loss 4.5000  gradient norm 1.25  learning rate 3.00e-03"),
        ({"train_mine": 8.5, "eval_mine": 7.5}, "train_mine 8.5  eval_mine 7.5"),
        ({"train_loss": 3.25, "epoch": 0.1}, "train_loss 3.25"),
        ({"note": "begun"}, "note begun"),
    ],
)
def test_a_line_begins_with_what_kind_of_log_it_is(logs, line):
    first, *others = log_line(20, logs).splitlines()
    assert first.startswith(f"    20  {line}")
    assert len(first) <= 100
    text = " ".join([first, *others])
    assert ("eval_mine 7.5" in text) == ("eval_mine" in logs)
    assert ("train_mine 8.5" in text) == ("train_mine" in logs)
    assert ("done:" in text) == line.startswith("done:")
    assert "per_second" not in text


def test_only_the_last_line_of_a_run_that_counts_tokens_says_done(tmp_path, capsys):
    run, lines, _ = run_and_read(tmp_path, capsys, include_num_input_tokens_seen="all")
    steps = [line for line in lines if line.split()[1] == "loss"]
    assert [int(line.split()[0]) for line in steps] == list(range(4, STEPS + 1, 4))
    assert all("tokens per second" in line for line in steps)
    assert [line for line in lines if "done:" in line] == [lines[-2]]  # the sizes of the model follow
    assert run.state.num_input_tokens_seen == STEPS * 4 * 16


def test_lines_reach_a_console_that_knows_ascii_only(tmp_path, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", out)
    trainer(tmp_path, "chtss", save_strategy="no").train()
    lines = out.buffer.getvalue().decode("ascii").splitlines()
    assert sum("sparse  -" in line for line in lines) == 18 // INTERVAL
    assert not any("?" in line for line in lines)


def test_the_losses_around_an_update_that_an_earlier_run_made_are_said(capsys):
    state = TrainerState(max_steps=9, global_step=5, is_world_process_zero=True)
    callback = ConsoleCallback(bars=False)
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs={"loss_before_update": 3.0, "loss_after_update": 2.75, "epoch": 0.5})
    assert "loss −0.250" in capsys.readouterr().out


def test_a_figure_of_the_users_that_is_called_as_one_of_an_update_is_an_ordinary_log(capsys):
    state = TrainerState(max_steps=9, global_step=5, is_world_process_zero=True)
    callback = ConsoleCallback(bars=False)
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs={"links_removed": 7, "loss_after_update": 2.5})
    assert capsys.readouterr().out == "     5  links_removed 7  loss_after_update 2.5\n"


def run_and_read(tmp_path, capsys, **options):
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
def test_a_run_says_in_one_line_per_update_what_happened(tmp_path, capsys, disable_tqdm):
    run, lines, errors = run_and_read(tmp_path, capsys, disable_tqdm=disable_tqdm)
    assert max(map(len, lines)) <= 100
    updates = [line for line in lines if "sparse  −" in line]
    assert [int(line.split()[0]) for line in updates] == [entry["step"] for entry in run.evolver.history]
    for line, entry in zip(updates, run.evolver.history, strict=True):
        assert f"  {entry['sparsity']:.1%} sparse  −" in line
        assert bool(re.search(r"loss [+−]\d", line)) == (entry["step"] < STEPS)
    assert len(updates) == 18 // INTERVAL  # the topology rests in the last quarter
    assert sum(" validation: " in line for line in lines) == STEPS // 6
    assert sum(" done: " in line for line in lines) == 1
    assert "it/s" not in errors  # stderr is no terminal here
    assert not any(line.startswith("{") for line in lines)


def test_an_update_in_the_last_step_is_said_too(capsys):
    state = TrainerState(max_steps=3, global_step=3, is_world_process_zero=True)
    callback = ConsoleCallback(bars=False)
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs=dict(FIGURES))
    assert capsys.readouterr().out == ""  # it waits for the loss of the next step
    callback.on_train_end(None, state, None)
    assert capsys.readouterr().out == update_line(3, FIGURES) + "\n"


def test_bars_are_drawn_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    state = TrainerState(max_steps=3, is_world_process_zero=True)
    for bars, expected in ((True, True), (False, False)):
        stream = Terminal()
        monkeypatch.setattr("sys.stderr", stream)
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

"""What an update logs goes with the loss of its step, so that callbacks that read the loss from every log live on."""

import pytest
from cases import INTERVAL, STEPS, trainer
from transformers import TrainerCallback

UPDATES = [4, 8, 12, 16]
_OF_LOSSES = ("loss_before_update", "loss_after_update")


class ReadsLosses(TrainerCallback):
    """As people write them: all that is logged while training goes on is a log of training."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "train_runtime" not in logs and "eval_loss" not in logs:
            self.seen.append((state.global_step, logs["loss"], logs["grad_norm"], logs["learning_rate"]))


class Board(TrainerCallback):
    """As TensorBoard's: every number by its name and step."""

    def __init__(self):
        self.seen = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name, value in logs.items():
            self.seen.setdefault(name, []).append((state.global_step, value))


def logged(directory, case="chtss", **changes):
    callbacks = [ReadsLosses(), Board()]
    run = trainer(directory, case, callbacks=callbacks, **({"save_strategy": "no"} | changes))
    run.train()
    return run, *(callback.seen for callback in callbacks)


@pytest.fixture(scope="module")
def each_step(tmp_path_factory):
    return logged(tmp_path_factory.mktemp("each_step"))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"logging_steps": 1}, list(range(1, STEPS + 1))),
        ({"logging_steps": 3}, sorted({*range(3, STEPS + 1, 3), *UPDATES})),
        ({"logging_strategy": "no"}, [*UPDATES, STEPS]),
        ({"logging_steps": 100, "eval_strategy": "steps", "eval_steps": 3}, [*UPDATES, STEPS]),
    ],
)
def test_every_log_of_training_has_the_loss(tmp_path, each_step, changes, steps):
    run, read, board = logged(tmp_path, **changes)
    assert [step for step, *_ in read] == steps
    # each is the mean of the steps since the last
    each = [loss for _, loss, *_ in each_step[1]]
    for first, last, loss in zip([0, *steps], steps, (loss for _, loss, *_ in read), strict=False):
        assert loss == pytest.approx(sum(each[first:last]) / (last - first), abs=2e-6)
    # every update is there once, at its step, with all its figures
    for name in run.evolver.history[0].keys() - {"step"}:
        assert board[name] == [(line["step"], line[name]) for line in run.evolver.history], name
    assert [step for step, _ in board["sparsity"]] == UPDATES
    entries = [entry for entry in run.state.log_history if "sparsity" in entry]
    assert [entry["step"] for entry in entries] == UPDATES
    assert all("loss" in entry for entry in entries)
    # so are the losses around it, though they may wait for the next log of training
    for name in _OF_LOSSES:
        told = [value for _, value in board[name]]
        assert told == [value for _, value in each_step[2][name]]
        assert all(step in steps for step, _ in board[name])
    assert [step for step, _ in each_step[2]["loss_after_update"]] == [step + 1 for step in UPDATES]


def test_an_update_after_every_step(tmp_path):
    _, read, board = logged(tmp_path, "set, as in its own paper", logging_steps=100)
    assert [step for step, _ in board["sparsity"]] == [step for step, *_ in read if step != STEPS]


@pytest.mark.parametrize("save", [{"save_steps": INTERVAL + 1}, {"save_strategy": "epoch", "max_steps": 32}])
def test_a_checkpoint_between_two_logs_has_what_was_to_be_logged(tmp_path, save):
    settings = {"logging_steps": 100, "save_strategy": "steps"} | save
    whole, _, board = logged(tmp_path, **settings)
    assert len(board["loss_after_update"]) == len(board["sparsity"]) == len(whole.evolver.history)
    first = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    again = trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(first))
    for name in (*_OF_LOSSES, "sparsity", "itop"):
        of_runs = [[e[name] for e in run.state.log_history if name in e] for run in (whole, again)]
        assert of_runs[0] == of_runs[1], name


def test_lines_of_the_console(tmp_path, capsys):
    logged(tmp_path, logging_steps=1)
    lines = capsys.readouterr().out.splitlines()
    place = {text: i for i, text in enumerate(lines)}
    updates = [i for text, i in place.items() if " sparse  " in text]
    assert len(updates) == len(UPDATES)
    for step, i in zip(UPDATES, updates, strict=True):
        # after the log of its step, and before that of the next, whose loss it tells
        assert lines[i - 1].split()[:2] == [str(step), "loss"]
        assert lines[i].split()[0] == str(step)
        assert " loss −" in lines[i] or " loss +" in lines[i]
        assert lines[i + 1].split()[:2] == [str(step + 1), "loss"]
        assert "sparsity" not in lines[i - 1] + lines[i + 1]
        assert "update" not in lines[i - 1] + lines[i + 1]

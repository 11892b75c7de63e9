"""auto_find_batch_size: an attempt with a smaller batch is the run that would have begun with it, bit for bit."""

import json
import logging
import random

import numpy as np
import pytest
import torch
from cases import INTERVAL, Invariants, all_of, arguments, case_config, differences, trainer
from tiny import random_blocks, tiny_llama
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed

from hf_chts import SparseTrainer

# 14 of 24 steps: updates after 4, 8 and 12
FAILS_AT = 14


class Draws(TrainerCallback):
    """Random numbers of every kind, as augmentation and dropout draw them."""

    def __init__(self):
        self.drawn = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.drawn = []
        numpy = float(np.random.random_sample())  # noqa: NPY002 - the generator that others use
        self.drawn.append([random.random(), numpy, float(torch.rand(()))])


def little_memory(monkeypatch, holds=3, fails_at=FAILS_AT):
    """Memory that holds batches of 3, and shows it in the midst of a step."""
    step = Trainer.training_step
    tried = []

    def with_little_memory(self, model, inputs, *args, **kwargs):
        size = len(inputs["input_ids"])
        tried.append((size, self.state.global_step))
        loss = step(self, model, inputs, *args, **kwargs)
        if size > holds and self.state.global_step + 1 == fails_at:
            raise RuntimeError("CUDA out of memory.")
        return loss

    monkeypatch.setattr(Trainer, "training_step", with_little_memory)
    return tried


def run_of(directory, size, case="chtss", draws=None, **changes):
    changes = {"save_strategy": "no", "weight_decay": 0.1} | changes
    return trainer(
        directory, case, model=tiny_llama(attention_dropout=0.2), callbacks=[draws or Draws()],
        per_device_train_batch_size=size, **changes,
    )  # fmt: skip


def read(directory):
    """The records of a run, times and what it is called apart."""
    files = [path for path in (directory / "topology").iterdir() if path.name != "seconds.jsonl"]
    return {path.name: path.read_bytes().split(b"\n")[path.suffix == ".jsonl" :] for path in files}


@pytest.mark.parametrize("case", ["rigl, historical weights", "gmp, global allocation", "chtss, per-weight Adam steps"])
def test_an_attempt_is_the_run_that_would_have_begun_with_it(tmp_path, monkeypatch, caplog, case):
    draws = [Draws(), Draws()]
    whole = run_of(tmp_path / "whole", 3, case, draws[0])
    whole.train()
    tried = little_memory(monkeypatch)
    run = run_of(tmp_path / "run", 4, case, draws[1], auto_find_batch_size=True)
    Invariants.watch(run)
    with caplog.at_level(logging.WARNING, logger="hf_chts"):
        run.train()
    assert tried[0] == (4, 0)
    assert tried[FAILS_AT - 1 : FAILS_AT + 1] == [(4, FAILS_AT - 1), (3, 0)]
    assert f"after step {FAILS_AT - 1}" in caplog.text
    assert differences(all_of(run), all_of(whole)) == []
    assert draws[0].drawn == draws[1].drawn
    assert read(tmp_path / "run") == read(tmp_path / "whole")
    assert (run.state.total_flos, run.state.train_batch_size) == (whole.state.total_flos, 3)
    for name, weight in run.model.named_parameters():
        expected = whole.optimizer.state[dict(whole.model.named_parameters())[name]]
        assert run.optimizer.state[weight].keys() == expected.keys()
        assert all(run.optimizer.state[weight][key].equal(value) for key, value in expected.items()), name


def test_an_optimizer_and_callbacks_of_the_users_begin_anew_too(tmp_path, monkeypatch):
    def with_own(directory, size, **changes):
        model = tiny_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        figures = iter(range(100, 0, -1))
        return SparseTrainer(
            model=model,
            args=arguments(
                directory, per_device_train_batch_size=size, eval_strategy="steps", eval_steps=4, save_steps=4,
                load_best_model_at_end=True, metric_for_best_model="figure", greater_is_better=True, max_steps=20,
                update_warmup_steps=0,
                **changes,
            ),
            sparsity=case_config("set"),
            train_dataset=random_blocks(),
            eval_dataset=random_blocks(8),
            compute_metrics=lambda prediction: {"figure": next(figures)},
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))),
            callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
        )  # fmt: skip

    whole = with_own(tmp_path / "whole", 3)
    whole.train()
    assert whole.state.global_step == 16  # the best is the first, and three are not better
    little_memory(monkeypatch)
    run = with_own(tmp_path / "run", 4, auto_find_batch_size=True)
    run.train()
    log = [
        [{key: value for key, value in entry.items() if key in ("loss", "learning_rate", "step")} for entry in entries]
        for entries in (run.state.log_history, whole.state.log_history)
    ]
    assert log[0] == log[1]
    assert run.state.global_step == 16


def test_checkpoints_of_a_failed_attempt_are_gone(tmp_path, monkeypatch, caplog):
    tried = little_memory(monkeypatch)
    run = run_of(tmp_path, 4, auto_find_batch_size=True, save_strategy="steps", save_steps=6)
    at_begin = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            at_begin.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
            control.should_training_stop = False

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = len(at_begin) == 2 and state.global_step == 7

    run.add_callback(Look())
    with caplog.at_level(logging.WARNING, logger="hf_chts"):
        run.train()
    assert (4, 12) in tried
    assert at_begin == [[], []]
    assert "its checkpoints (2) are removed" in caplog.text
    # what is resumed is the attempt that there was last
    state = json.loads((tmp_path / "checkpoint-6/trainer_state.json").read_text())
    assert state["train_batch_size"] == 3
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6"]
    again = run_of(tmp_path, 3, auto_find_batch_size=True, save_strategy="no")
    again.train(resume_from_checkpoint=True)
    whole = run_of(tmp_path / "whole", 3)
    whole.train()
    assert differences(all_of(again), all_of(whole)) == []


def test_trained_twice_each_attempt_begins_with_what_the_first_left(tmp_path, monkeypatch):
    runs = [run_of(tmp_path / "whole", 3), run_of(tmp_path / "run", 3, auto_find_batch_size=True)]
    for run in runs:
        set_seed(5)
        run.train()
    little_memory(monkeypatch, holds=2, fails_at=INTERVAL + 2)
    runs[1]._train_batch_size = 3
    runs[0]._train_batch_size = 2
    for run in runs:
        set_seed(7)
        run.train()
    assert differences(all_of(runs[0]), all_of(runs[1])) == []

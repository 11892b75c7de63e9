"""Batches in which every label is -100: they teach nothing, and are no divergence."""

import logging
import math

import pytest
import torch
from cases import INTERVAL, Invariants, arguments, case_config, losses, same_weights, trainer, weights
from datasets import Dataset
from tiny import VOCABULARY, random_blocks, tiny_llama
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_chts import SparseTrainer
from hf_chts.training.unlabelled import without_labels


def blocks(unlabelled, count=96):
    """Rows by their place; those of `unlabelled` have no label but for the first token, which nothing predicts."""
    rows = random_blocks(count)
    labels = [[ids[0]] + [-100] * (len(ids) - 1) if i in unlabelled else ids for i, ids in enumerate(rows["input_ids"])]
    return Dataset.from_dict({"input_ids": rows["input_ids"], "labels": labels})


class InOrder:
    """Rows in their order, so that it is known which are in a batch."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Plain(InOrder, Trainer):
    pass


class Sparse(InOrder, SparseTrainer):
    pass


def pair(directory, unlabelled, kind=(Plain, Sparse), **changes):
    data = blocks(unlabelled)
    settings = {"max_steps": 8, "save_strategy": "no", **changes}
    runs = (
        kind[0](
            model=tiny_llama(), train_dataset=data,
            args=arguments(directory / "a", TrainingArguments, lr_scheduler_type="cosine", **settings),
        ),
        kind[1](
            model=tiny_llama(), train_dataset=data, args=arguments(directory / "b", **settings),
            sparsity=case_config("dense"),
        ),
    )  # fmt: skip
    return runs


@pytest.mark.parametrize("counted", [True, False])
def test_dense_goes_on_as_the_plain_trainer_does(tmp_path, caplog, counted):
    size, accumulation = 4, 3
    # the very first micro-batch, all that the third step has, and the first of the fifth
    a_step = accumulation * size
    none = {*range(size), *range(2 * a_step, 3 * a_step), *range(4 * a_step, 4 * a_step + size)}
    runs = pair(tmp_path, none, gradient_accumulation_steps=accumulation)
    for run in runs:
        if not counted:  # a mean over each micro-batch: 0 / 0 where the plain loss would be 0 / n
            run.model_accepts_loss_kwargs = False
        with caplog.at_level(logging.WARNING):
            run.train()
    assert same_weights(weights(runs[0]), weights(runs[1]))
    assert losses(runs[0]) == losses(runs[1])
    assert losses(runs[0])[2] == 0
    told = [record.args[0] for record in caplog.records if "no label" in record.message]
    assert told[-1] == 2 + accumulation
    assert len(told) <= 2


def test_the_loss_of_such_a_batch_is_0_where_nothing_is_filtered(tmp_path):
    _, ours = pair(tmp_path, range(8, 12), logging_nan_inf_filter=False)
    plain, _ = pair(tmp_path / "filtered", range(8, 12))
    plain.train()
    ours.train()
    assert same_weights(weights(plain), weights(ours))
    assert losses(ours)[2] == 0
    assert losses(ours) == losses(plain)


@pytest.mark.parametrize("case", ["chtss", "rigl"])
def test_updates_go_on_without_labels(tmp_path, case):
    # the batches of the first update, of the step after it, and of another
    none = {row for step in (INTERVAL, INTERVAL + 1, 3 * INTERVAL) for row in range(4 * step - 4, 4 * step)}
    run = Sparse(
        model=tiny_llama(), args=arguments(tmp_path, save_strategy="no"), sparsity=case_config(case),
        train_dataset=blocks(none),
    )  # fmt: skip

    class Zero(Invariants):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if 4 * state.global_step in none:
                for layer in self.trainer.sparse.layers.values():
                    assert layer.weight.grad.eq(0).all()
            else:
                super().on_pre_optimizer_step(args, state, control, **kwargs)

    Zero.watch(run)
    run.train()
    assert [line["step"] for line in run.evolver.history] == [4, 8, 12, 16]
    assert [step for step, loss in enumerate(losses(run), 1) if loss == 0] == [4, 5, 12]
    # around the updates after steps 4 and 12 there is no loss to compare
    told = [entry["step"] for entry in run.state.log_history if "loss_after_update" in entry]
    assert told == [9, 17]


def test_a_model_that_has_diverged_is_not_excused(tmp_path):
    class Spoilt(Sparse):
        def training_step(self, model, *args, **kwargs):
            if self.state.global_step == 2:  # the step without labels
                with torch.no_grad():
                    self.model.model.norm.weight.fill_(math.nan)
            return super().training_step(model, *args, **kwargs)

    run = Spoilt(
        model=tiny_llama(), args=arguments(tmp_path, max_steps=3, logging_steps=100), sparsity=case_config("dense"),
        train_dataset=blocks(range(8, 12)),
    )  # fmt: skip
    with pytest.raises(FloatingPointError):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("filtered", [True, False])
def test_the_loss_of_an_evaluation_is_that_of_the_batches_with_labels(tmp_path, caplog, filtered):
    run = trainer(tmp_path, "dense", logging_nan_inf_filter=filtered, per_device_eval_batch_size=4)
    data = blocks(range(4, 8), count=14)
    with caplog.at_level(logging.WARNING, logger="hf_chts"):
        measured = run.evaluate(data)
    assert "1 batches of eval have no label" in caplog.text
    run.model.eval()
    expected, rows = 0.0, 0
    for first in (0, 8, 12):
        batch = default_data_collator([data[i] for i in range(first, min(first + 4, 14))])
        with torch.no_grad():
            logits = run.model(batch["input_ids"]).logits[:, :-1].reshape(-1, VOCABULARY)
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].reshape(-1))
        expected, rows = expected + float(loss) * len(batch["labels"]), rows + len(batch["labels"])
    assert measured["eval_loss"] == pytest.approx(expected / rows, rel=1e-6)
    assert run.state.log_history[-1]["eval_loss"] == measured["eval_loss"]
    # nothing to measure is no loss of 0, and no figure at all
    assert math.isnan(run.evaluate(blocks(range(8), count=8))["eval_loss"])
    caplog.clear()
    run.evaluate(blocks((), count=8))
    assert "no label" not in caplog.text


def test_what_has_labels():
    def of(labels, shifted=False, **more):
        found = without_labels({"labels": torch.tensor(labels), **more}, shifted=shifted)
        return None if found is None else bool(found)

    assert of([[-100, -100], [-100, -100]])
    assert not of([[-100, -100], [-100, 0]])
    assert not of([[5, -100]])
    assert of([[5, -100]], shifted=True)
    assert of([-100, -100], shifted=True)  # one for each row
    assert not of([-100, 1])
    assert not of([[5, -100]], shifted=True, shift_labels=torch.tensor([[1, -100]]))
    assert of([[0.5, -100.0]]) is None
    assert without_labels({"input_ids": torch.zeros(1, 2)}, shifted=True) is None

"""The best model of a run is as sparse as was asked for, and what says how sparse a model is says what is there."""

import json
import logging

import pytest
from cases import STEPS, Stop, arguments, case_config, check_links, trainer
from huggingface_hub import ModelCard
from tiny import random_blocks, tiny_llama
from transformers import EarlyStoppingCallback, TrainerState

from hf_chts import SparseTrainer, SparseTrainingArguments, SparsityConfig, SparsityHandle, export_sparse, load_sparse

# of the schedule of "chtss" over 24 steps with updates after 4, 8, 12 and 16: 0.9 is reached at 8; of "gmp" at 16
REACHED = {"chtss": 8, "gmp": 16}


def rated(directory, figures, case="gmp", callbacks=(), **changes):
    """A run that is evaluated and saved after every 4 steps, with these figures one after the other."""
    figures = iter(figures)
    settings = {
        "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True,
        "metric_for_best_model": "figure", "greater_is_better": True,
    }  # fmt: skip
    return SparseTrainer(
        model=tiny_llama(),
        args=arguments(directory, **(settings | changes)),
        sparsity=case_config(case),
        train_dataset=random_blocks(),
        eval_dataset=random_blocks(8),
        compute_metrics=lambda prediction: {"figure": next(figures)},
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("case", REACHED)
def test_the_step_from_which_evaluations_count(tmp_path, case):
    plan = case_config(case).plan(STEPS)
    reached = REACHED[case]
    assert plan.sparsity(reached) == pytest.approx(0.9)
    assert plan.sparsity(reached - 1) < 0.9 - 1e-6
    run = rated(tmp_path, [*[9.0] * (reached // 4 - 1), 1.0, 2.0, 1.5, 1.0, 0.5], case)
    run.train()
    assert (run.state.best_metric, run.state.best_global_step) == (2.0, reached + 4)
    assert run.sparse.sparsity() == pytest.approx(0.9, abs=1e-3)
    check_links(run.sparse, 0.9)


def test_at_any_sparsity_if_that_is_asked_for(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_chts"):
        run = rated(tmp_path, [9.0, 1.0, 2.0, 1.5, 1.0, 0.5], best_at_any_sparsity=True)
        run.train()
    assert (run.state.best_metric, run.state.best_global_step) == (9.0, 4)
    assert run.sparse.sparsity() < 0.85
    run.sparse.check()  # the masks are those of its weights
    assert f"sparsity of {run.sparse.sparsity():.4g} where 0.9 was asked for" in caplog.text


def test_patience_begins_where_evaluations_count(tmp_path):
    figures = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]  # worse at every evaluation
    run = rated(tmp_path, figures, callbacks=[EarlyStoppingCallback(early_stopping_patience=1)])
    run.train()
    assert run.state.global_step == 20  # the first that counts is that of step 16
    assert run.state.best_global_step == 16
    early = rated(
        tmp_path / "early", figures, callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        best_at_any_sparsity=True,
    )  # fmt: skip
    early.train()
    assert early.state.global_step == 8
    assert early.state.best_global_step == 4


def test_a_run_that_ends_too_early_keeps_its_last_model_and_says_so(tmp_path, caplog):
    run = rated(tmp_path, [9.0, 8.0, 7.0], callbacks=[Stop(12)])
    with caplog.at_level(logging.WARNING, logger="hf_chts"):
        run.train()
    assert run.state.best_model_checkpoint is None
    assert "No evaluation counts for the best model" in caplog.text
    there = run.sparse.sparsity()
    assert there == pytest.approx(case_config("gmp").plan(STEPS).sparsity(12), abs=1e-3)
    assert f"{there:.4g}" in caplog.text


def test_save_strategy_best_saves_what_counts(tmp_path):
    run = rated(tmp_path, [9.0, 8.0, 7.0, 1.0, 2.0, 1.0], save_strategy="best", load_best_model_at_end=False)
    run.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-16", "checkpoint-20"]


def test_a_best_of_a_state_that_did_not_ask_for_the_sparsity_is_forgotten(tmp_path):
    first = rated(tmp_path, [9.0, 1.0, 1.0, 1.0, 1.0, 1.0], best_at_any_sparsity=True)
    first.train()
    assert TrainerState.load_from_json(str(tmp_path / "checkpoint-12" / "trainer_state.json")).best_global_step == 4
    again = rated(tmp_path, [2.0, 3.0, 1.0])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert (again.state.best_metric, again.state.best_global_step) == (3.0, 20)


def test_all_evaluations_of_a_run_of_constant_sparsity_count(tmp_path):
    run = rated(tmp_path, [9.0, 8.0, 7.0, 6.0, 5.0, 4.0], "set")
    run.train()
    assert run.state.best_global_step == 4


def test_a_model_that_was_there_before_counts_at_once(tmp_path):
    model = tiny_llama()
    trainer(tmp_path / "first", "gmp", model=model, save_strategy="no").train()
    run = SparseTrainer(
        model=model,
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=4, save_steps=4, load_best_model_at_end=True),
        train_dataset=random_blocks(),
        eval_dataset=random_blocks(8),
    )
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    assert run.state.best_global_step == min(losses, key=losses.__getitem__)
    assert run.target_reached_at() == 0


def test_the_argument_is_true_or_false(tmp_path):
    assert not SparseTrainingArguments(str(tmp_path), use_cpu=True).best_at_any_sparsity
    with pytest.raises(ValueError, match="best_at_any_sparsity is 'yes'"):
        SparseTrainingArguments(str(tmp_path), use_cpu=True, best_at_any_sparsity="yes")


def test_exports_say_the_sparsity_that_is_there(tmp_path):
    run = rated(tmp_path / "run", [9.0, 1.0, 2.0, 1.5, 1.0, 0.5], best_at_any_sparsity=True)
    run.train()
    there = run.sparse.sparsity()
    assert there < 0.85
    saved = json.loads((tmp_path / "run/checkpoint-4/sparsity_config.json").read_text())
    assert saved["measured_sparsity"] == pytest.approx(there, abs=1e-9)
    for packed in (False, True):
        export = export_sparse(run.model, tmp_path / f"export-{packed}", packed=packed)
        saved = json.loads((export / "sparsity_config.json").read_text())
        assert saved["sparsity"] == 0.9
        assert saved["measured_sparsity"] == pytest.approx(there, abs=1e-9)
        assert f"{there:.2%} is what it has" in ModelCard.load(export / "README.md").text
        assert SparsityConfig.load(export) == case_config("gmp")
        assert SparsityHandle.of(load_sparse(export)).sparsity() == there


def test_nothing_is_said_of_a_model_that_is_as_was_asked_for(tmp_path):
    run = trainer(tmp_path, "gmp", save_steps=24)
    run.train()
    for directory in (export_sparse(run.model, tmp_path / "export"), tmp_path / "checkpoint-24"):
        assert "measured_sparsity" not in json.loads((directory / "sparsity_config.json").read_text())
    assert "is what it has" not in (tmp_path / "export/README.md").read_text()

"""NaN and infinity at each stage of a run: it stops, says where, and saves, evolves and pushes nothing of it."""

import math

import pytest
import torch
from cases import INTERVAL, STEPS, arguments, case_config, losses, trainer, weights
from tiny import random_blocks, tiny_llama
from transformers import TrainerCallback

from hf_chts import SparseTrainer
from hf_chts.checkpoint.seal import SEAL_NAME, verify_seal
from hf_chts.evolution.held_tensors import weights_and_moments
from hf_chts.finite import not_finite
from hf_chts.training.divergence import StopsOnDivergence

POISONED = "model.layers.1.mlp.up_proj.weight"


class Poisoned(SparseTrainer):
    """A gradient becomes NaN in the backward pass of one step, with a finite loss."""

    step = 0

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step + 1 == self.step:
            assert loss.isfinite()
            weight = self.model.get_parameter(POISONED)
            weight.grad.view(-1)[int(weight.grad.view(-1).abs().argmax())] = math.nan
        return loss


def poisoned(directory, case, step, model=None, **changes):
    run = Poisoned(
        model=model or tiny_llama(),
        args=arguments(directory, **changes),
        sparsity=case_config(case),
        train_dataset=random_blocks(),
        eval_dataset=random_blocks(8),
    )
    run.step = step
    return run


def as_on_a_device(monkeypatch):
    """As on a GPU: the host does not check the norm of each gradient, for it would wait for the device."""
    look = StopsOnDivergence._refuse_divergence
    monkeypatch.setattr(
        StopsOnDivergence, "_refuse_divergence", lambda run, together: look(run, together=True) if together else None
    )


class After(TrainerCallback):
    """Calls `do` as a step ends, before the topology is updated and anything is saved."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.do(model, optimizer)


def spoil_weight(model, optimizer):
    model.get_parameter(POISONED).view(-1)[7] = math.inf


def spoil_moment(model, optimizer):
    optimizer.state[model.get_parameter(POISONED)]["exp_avg_sq"].view(-1)[7] = math.inf


def sealed(directory):
    return sorted(path.name for path in directory.glob("checkpoint-*") if (path / SEAL_NAME).is_file())


@pytest.mark.parametrize(
    ("case", "on_a_device", "logging_steps"),
    [("chtss", False, 100), ("chtss", True, 1), ("chtss", True, 100), ("dense", False, 1), ("dense", True, 100)],
)
def test_a_gradient_that_is_nan_costs_no_checkpoint(tmp_path, monkeypatch, case, on_a_device, logging_steps):
    if on_a_device:
        as_on_a_device(monkeypatch)
    settings = {"save_steps": 3, "save_total_limit": 1, "logging_steps": logging_steps}
    run = poisoned(tmp_path, case, 6, **settings)
    with pytest.raises(FloatingPointError, match=r"gradient.* in step 6\b.*checkpoint-3") as error:
        run.train()
    assert "NaN" in str(error.value)
    assert sealed(tmp_path) == ["checkpoint-3"]
    verify_seal(tmp_path / "checkpoint-3")
    if not on_a_device:  # the optimizer has not stepped
        assert all(weight.isfinite().all() for weight in weights(run).values())


@pytest.mark.parametrize(("case", "on_a_device"), [("chtss", True), ("dense", False)])
def test_a_gradient_that_is_nan_in_the_last_step_fails_the_run(tmp_path, monkeypatch, case, on_a_device):
    if on_a_device:
        as_on_a_device(monkeypatch)
    run = poisoned(tmp_path, case, STEPS, save_strategy="no", logging_steps=100)
    with pytest.raises(FloatingPointError, match=rf"in step {STEPS}\b.*no earlier checkpoint"):
        run.train()


@pytest.mark.parametrize(
    ("case", "do", "named", "save"),
    [
        ("chtss", spoil_weight, "", "steps"),
        ("chtss", spoil_moment, "optimizer state of ", "no"),
        ("dense", spoil_moment, "optimizer state of ", "steps"),
        ("dense", spoil_weight, "", "no"),
    ],
)
def test_weights_and_moments_are_checked_before_a_save_and_at_the_end(tmp_path, case, do, named, save):
    step = 10 if save == "steps" else STEPS
    run = trainer(
        tmp_path, case, callbacks=[After(step, do)], save_steps=5, save_total_limit=1, save_strategy=save,
        logging_steps=100,
    )  # fmt: skip
    last = "is .*checkpoint-5" if save == "steps" else "no earlier checkpoint"
    with pytest.raises(FloatingPointError, match=rf"step {step}\b.*: {named}{POISONED}\. .*{last}"):
        run.train()
    assert sealed(tmp_path) == (["checkpoint-5"] if save == "steps" else [])
    assert not (tmp_path / f"checkpoint-{step}").exists()


def test_a_finite_run_is_never_refused(tmp_path):
    run = trainer(tmp_path, save_strategy="no", optim="adafactor")
    run.train()
    device = torch.device("cpu")
    held = weights_and_moments(run.model, run.optimizer)
    assert set(dict(run.model.named_parameters())) < held.keys()
    assert not_finite(held, device=device) == []
    assert not_finite({}, device=device) == []
    assert not_finite({"none": [], "empty": [torch.zeros(0)], "steps": [torch.tensor(3)]}, device=device) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 517, 1022])
def test_one_value_in_a_thousand_is_found(dtype, value, place):
    large = torch.linspace(-1, 1, 1023, dtype=torch.float64).mul(torch.finfo(dtype).max).to(dtype)
    spoilt = large.clone()
    spoilt[place] = value
    found = {"a": [large], "b": [torch.zeros(3), spoilt], "c": [large, large]}
    assert not_finite(found, device=torch.device("cpu")) == ["b"]


def spoil_stored(run):
    def do(model, optimizer):
        run.evolver.stored[POISONED.removesuffix(".weight")].part.view(-1)[3] = math.nan

    return do


def spoil_dense_gradient(run):
    def do(model, optimizer):
        run.sparse.layers[POISONED.removesuffix(".weight")].dense_gradient.sum[0, 0] = math.inf

    return do


@pytest.mark.parametrize(
    ("case", "what", "spoil"),
    [
        *((case, "weight", lambda run: spoil_weight) for case in ("chtss", "gmp, global allocation")),
        ("set, percolation", "weight", lambda run: spoil_weight),
        ("rigl, historical weights", "stored weights", spoil_stored),
        ("rigl", "dense gradient", spoil_dense_gradient),
    ],
)
def test_an_update_refuses_what_is_not_finite(tmp_path, case, what, spoil):
    run = trainer(tmp_path, case, save_steps=6)
    saved, masks = After(6, lambda model, optimizer: None), {}
    spoiler = After(2 * INTERVAL, spoil(run))
    for callback in (spoiler, saved):
        run.callback_handler.callbacks.insert(0, callback)
    saved.do = lambda model, optimizer: masks.update({n: m.clone() for n, m in run.sparse.masks().items()})
    layer = POISONED.removesuffix(".weight")
    with pytest.raises(FloatingPointError, match=rf"step {2 * INTERVAL}\b.*: {what} of {layer}\. .*checkpoint-6"):
        run.train()
    assert all(mask.equal(masks[name]) for name, mask in run.sparse.masks().items())
    assert [line["step"] for line in run.evolver.history] == [INTERVAL]


def test_a_scaled_loss_may_overflow_in_an_update(tmp_path):
    """With fp16 the scaler skips the step: its dense gradient is infinite, but nothing has diverged."""
    run = trainer(tmp_path, "rigl", save_strategy="no")
    run.callback_handler.callbacks.insert(0, After(2 * INTERVAL, spoil_dense_gradient(run)))

    class Scaled(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            run.evolver.engine.loss_scale = lambda: 2.0**16

    run.add_callback(Scaled())
    run.train()
    assert [line["step"] for line in run.evolver.history] == [4, 8, 12, 16]
    run.sparse.check()


def test_nothing_that_is_not_finite_is_pushed(hub, waits, tmp_path):
    run = poisoned(
        tmp_path / "run", "chtss", 15, max_steps=16, save_steps=8, push_to_hub=True, hub_model_id="me/run",
        hub_strategy="every_save", hub_always_push=True,
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match="in step 15"):
        run.train()
    run._wait_for_push()
    commits = hub.repositories["me/run"].branches["main"]
    assert [commit[1] for commit in commits[1:]] == ["Training in progress, step 8"]
    with torch.no_grad():
        spoil_weight(run.model, None)
    before, files = len(commits), set((tmp_path / "run").iterdir())
    with pytest.raises(FloatingPointError, match=f"nothing is pushed: {POISONED}"):
        run.push_to_hub()
    assert len(commits) == before
    assert set((tmp_path / "run").iterdir()) == files


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_is_never_the_best(tmp_path, value):
    figures = iter([1.0, value, 3.0, value, 2.0, value])
    run = SparseTrainer(
        model=tiny_llama(),
        args=arguments(
            tmp_path, eval_strategy="steps", eval_steps=4, save_steps=4, load_best_model_at_end=True,
            metric_for_best_model="figure", greater_is_better=True,
        ),
        sparsity=case_config("set"),
        train_dataset=random_blocks(),
        eval_dataset=random_blocks(8),
        compute_metrics=lambda prediction: {"figure": next(figures)},
    )  # fmt: skip
    run.train()
    assert (run.state.best_metric, run.state.best_global_step) == (3.0, 12)


def test_a_nan_loss_is_distinguished_from_a_nan_gradient(tmp_path):
    class Spoilt(SparseTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * math.nan if self.state.global_step == 6 else loss

    run = Spoilt(
        model=tiny_llama(), args=arguments(tmp_path), sparsity=case_config("set"), train_dataset=random_blocks()
    )
    with pytest.raises(FloatingPointError, match="the loss was NaN or infinite in step 7"):
        run.train()
    assert losses(run)[-1] > 0
    assert len(losses(run)) == 6


@pytest.mark.parametrize("case", ["chtss", "dense"])
def test_frozen_weights_are_checked_before_training(tmp_path, case):
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)[7, 3] = math.nan
    run = trainer(tmp_path, case, model=model)
    with pytest.raises(FloatingPointError, match=r"embed_tokens\.weight"):
        run.train()
    assert run.state.global_step == 0
    assert not list(tmp_path.glob("checkpoint-*"))

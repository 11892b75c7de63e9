"""SparseTrainer: the invariants at every step, equality with the plain Trainer, resume bit for bit."""

import copy

import pytest
import torch
from cases import (
    CASES,
    INTERVAL,
    STEPS,
    Invariants,
    all_of,
    arguments,
    case_config,
    differences,
    losses,
    same_weights,
    trainer,
)
from tiny import random_blocks, tiny_llama
from transformers import TrainerCallback

from hf_chts import SparseTrainer, SparsityConfig, SparsityHandle, sparsify
from hf_chts.topology.allocation import allocate_links

UPDATES = {
    "static": 0,
    "set, as in its own paper": 5,
    "topk": 3,  # steps of this size bring no link back once the sparsity stays
    "topk, other weights and rate by density": 3,
}


@pytest.mark.parametrize(
    ("case", "bf16"),
    [*((case, False) for case in ("static", *CASES)), ("rigl", True), ("chtss, per-weight Adam steps", True)],
)
def test_invariants_at_every_step(tmp_path, case, bf16):
    run = trainer(tmp_path, case, bf16=bf16, gradient_accumulation_steps=2, save_strategy="no")
    invariants = Invariants.watch(run)
    run.train()
    assert invariants.updates == UPDATES.get(case, 18 // INTERVAL)
    assert all(layer.dense_gradient is None for layer in run.sparse.layers.values())


def test_allocation_over_layers_holds_at_every_update(tmp_path):
    run = SparseTrainer(
        model=tiny_llama(),
        args=arguments(tmp_path, save_strategy="no"),
        sparsity=case_config("chtss", allocation="erdos_renyi"),
        train_dataset=random_blocks(),
    )
    run.train()
    shapes = {name: tuple(mask.shape) for name, mask in run.sparse.masks().items()}
    assert {name: layer.links for name, layer in run.sparse.layers.items()} == allocate_links(
        shapes, 0.9, "erdos_renyi"
    )
    possible = sum(mask.numel() for mask in run.sparse.masks().values())
    assert run.sparse.links() == round(possible * 0.1)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_dense_gradient_is_that_of_an_unmasked_copy(tmp_path, accumulation):
    seen = {}

    class Gradients(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step + 1 == INTERVAL:
                seen.update({name: layer.dense_gradient.sum.clone() for name, layer in run.sparse.layers.items()})
            else:
                assert all(layer.dense_gradient is None for layer in run.sparse.layers.values())

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step + 1 == INTERVAL:
                seen["model"] = copy.deepcopy(run.model)

    run = trainer(
        tmp_path, "rigl", callbacks=[Gradients()], gradient_accumulation_steps=accumulation, save_strategy="no",
        max_grad_norm=1e-3, max_steps=8,
    )  # fmt: skip
    batches = []
    inner = run.training_step
    run.training_step = lambda model, inputs, *rest: (batches.append(inputs), inner(model, inputs, *rest))[1]
    run.train()
    dense = seen.pop("model")
    dense.zero_grad()
    SparsityHandle.of(dense).unsparsify()
    for inputs in batches[(INTERVAL - 1) * accumulation : INTERVAL * accumulation]:
        (dense(**inputs).loss / accumulation).backward()
    assert len(seen) == 14
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, dense.get_parameter(f"{name}.weight").grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ["set", "chtss"])
def test_historical_weights_come_back(tmp_path, method):
    left, back = {}, []

    class History(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            self.before = {n: (x.weight.detach().clone(), x.mask.clone()) for n, x in run.sparse.layers.items()}

        def on_step_end(self, args, state, control, **kwargs):
            for name, layer in run.sparse.layers.items():
                weight, mask = self.before[name]
                known = left.setdefault(name, torch.zeros_like(weight))
                come, gone = layer.mask & ~mask, mask & ~layer.mask
                assert layer.weight[come].equal(known[come])
                back.append(int(known[come].ne(0).sum()))
                known[gone] = weight[gone]

    run = SparseTrainer(
        model=tiny_llama(),
        args=arguments(tmp_path, save_strategy="no"),
        sparsity=case_config(method, regrown_weights="historical", drop_fraction=0.5),
        train_dataset=random_blocks(),
    )
    run.add_callback(History())
    run.train()
    assert sum(back) > 0


def test_the_clipped_norm_is_that_of_the_masked_gradient(tmp_path):
    class Norms(TrainerCallback):
        expected = None

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            squares = [p.grad.square().sum() for p in model.parameters()]
            Norms.expected = torch.stack(squares).sum().sqrt().item()

    run = trainer(tmp_path, "static", callbacks=[Norms()], max_steps=1, max_grad_norm=1e9, save_strategy="no")
    run.train()
    logged = next(entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry)
    assert logged == pytest.approx(Norms.expected, rel=1e-5)


@pytest.mark.parametrize("case", ["static", *CASES])
def test_resume_bit_for_bit(tmp_path, case):
    whole = trainer(tmp_path / "whole", case, save_steps=6)
    whole.train()
    expected = all_of(whole)
    for step in (6, 18):  # between two updates, and after the last one
        resumed = trainer(tmp_path / f"from {step}", case, model=tiny_llama(seed=5), save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
        assert differences(all_of(resumed), expected) == []
    # the topology is updated at 12 too; and nothing may be left of a run that has ended in the same trainer
    whole.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-12"))
    assert differences(all_of(whole), expected) == []


def test_what_is_logged_with_each_update(tmp_path):
    run = trainer(tmp_path, save_strategy="no")
    run.train()
    entries = [entry for entry in run.state.log_history if "itop" in entry]
    assert [entry["step"] for entry in entries] == [4, 8, 12, 16]
    plan = case_config().plan(STEPS)
    for entry in entries:
        assert entry["sparsity"] == pytest.approx(plan.sparsity(entry["step"]), abs=1e-3)
        assert 0 <= entry["overlap"] <= 1
        assert 0 < entry["active_neurons"] <= 1
        assert entry["topology_seconds"] > 0
    possible = sum(mask.numel() for mask in run.sparse.masks().values())
    links = possible / 2  # at the start
    for entry in entries:
        links += entry["links_regrown"] - entry["links_removed"]
        assert links == pytest.approx(possible * (1 - entry["sparsity"]), abs=1)
    # nothing explored is forgotten, and at least the present links are explored
    itop = [entry["itop"] for entry in entries]
    assert itop == sorted(itop)
    assert 0.5 < itop[0] <= itop[-1] < 1


def test_model_init(tmp_path):
    run = SparseTrainer(
        model_init=lambda: tiny_llama(), args=arguments(tmp_path), sparsity=case_config(), train_dataset=random_blocks()
    )
    run.train()
    first, masks = losses(run), {name: mask.clone() for name, mask in run.sparse.masks().items()}
    run.train()
    assert losses(run) == first
    assert all(masks[name].equal(mask) for name, mask in run.sparse.masks().items())
    assert [entry["step"] for entry in run.evolver.history] == [4, 8, 12, 16]


def test_a_handle_is_taken_as_it_is(tmp_path):
    model = tiny_llama()
    sparse = sparsify(model, case_config("set"))
    assert SparseTrainer(model=model, args=arguments(tmp_path)).sparse is sparse
    assert SparseTrainer(model=model, args=arguments(tmp_path), sparsity=sparse).sparse is sparse
    with pytest.raises(ValueError, match="handle of another model"):
        SparseTrainer(model=tiny_llama(), args=arguments(tmp_path), sparsity=sparse)
    with pytest.raises(ValueError, match="sparse already, with another config"):
        SparseTrainer(model=model, args=arguments(tmp_path), sparsity=case_config("chts"))


def test_schedules_that_do_not_fit_leave_the_model_alone(tmp_path):
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="update_interval is 100 steps"):
        SparseTrainer(model=model, args=arguments(tmp_path), sparsity=SparsityConfig())
    assert same_weights(before, model.state_dict())


@pytest.mark.parametrize("case", ["rigl, historical weights", "chtss, per-weight Adam steps"])
def test_training_again_with_masks_that_the_optimizer_has_not_stepped_on(tmp_path, case):
    def train(run, floor=0.9):
        invariants = Invariants.watch(run, floor)
        run.train()
        run.remove_callback(invariants)
        run.evolver.check()

    first = trainer(
        tmp_path / "first", case, max_steps=16, save_steps=4, eval_strategy="steps", eval_steps=4,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,  # an early one
    )  # fmt: skip
    train(first, floor=0.0)
    assert not first.state.best_model_checkpoint.endswith("checkpoint-16")
    train(first)
    second = trainer(tmp_path / "second", case, model=first.model, save_strategy="no")
    train(second)
    train(first)
    layer = first.sparse.layers["model.layers.0.self_attn.q_proj"]
    layer.set_mask(layer.topology.roll(1, 0))
    train(first)

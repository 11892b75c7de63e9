"""Every architecture through the whole way: sparsify, train with evolution, export, load again, resume."""

import copy
from dataclasses import dataclass

import pytest
import torch
from cases import arguments
from tiny import VOCABULARY, random_blocks
from tiny_architectures import ARCHITECTURES
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from hf_chts import (
    SparseModel,
    SparseTrainer,
    SparseTrainerMixin,
    SparseTrainingArguments,
    SparsityConfig,
    export_sparse,
    load_sparse,
)

STEPS, INTERVAL, SPARSITY = 8, 2, 0.8
IDS = torch.arange(24).view(2, 12) * 5 % VOCABULARY
LLAMA_LIKE = ["llama", "llama_grouped", "mistral", "qwen3", "gemma3_text"]


class SparseSeq2SeqTrainer(SparseTrainerMixin, Seq2SeqTrainer):
    pass


@dataclass
class SparseSeq2SeqTrainingArguments(SparseTrainingArguments, Seq2SeqTrainingArguments):
    pass


def trainer(name, directory, method="rigl", model=None, config=None, **changes):
    architecture = ARCHITECTURES[name]
    settings = {"max_steps": STEPS, "save_strategy": "no", "update_warmup_steps": 1} | changes
    seq2seq = architecture.is_encoder_decoder
    kind = SparseSeq2SeqTrainingArguments if seq2seq else SparseTrainingArguments
    return (SparseSeq2SeqTrainer if seq2seq else SparseTrainer)(
        model=model or architecture.model(),
        args=arguments(directory, kind, **settings),
        sparsity=SparsityConfig(
            method=method,
            sparsity=SPARSITY,
            update_interval=INTERVAL,
            drop_fraction=0.3,
            target_modules=architecture.target_modules,
            **(config or {}),
        ),
        train_dataset=random_blocks(length=12),
    )


class Invariants(TrainerCallback):
    """After each step, links as many as there should be, and nothing off them."""

    def __init__(self, run, expected):
        self.run, self.expected = run, expected
        self.changed = {}  # layers whose topology changed, by step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for name, layer in self.run.sparse.layers.items():
            assert layer.weight.grad[~layer.mask].eq(0).all(), name
            assert layer.weight.grad[layer.mask].ne(0).any(), name

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.before = {name: mask.clone() for name, mask in self.run.sparse.masks().items()}

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        plan = self.run.sparse.config.plan(STEPS)
        sparsity = plan.sparsity(state.global_step - state.global_step % INTERVAL)
        for name, layer in self.run.sparse.layers.items():
            out, inn = self.expected[name]
            assert layer.topology.shape == (out, inn)
            assert int(layer.topology.sum()) == round(out * inn * (1 - sparsity)), name
            moments = optimizer.state[layer.weight]
            for tensor in (layer.weight, moments["exp_avg"], moments["exp_avg_sq"]):
                assert tensor[~layer.mask].eq(0).all(), name
        changed = {name for name, mask in self.run.sparse.masks().items() if not mask.equal(self.before[name])}
        if changed:
            self.changed[state.global_step] = changed


def inputs(model):
    return {"input_ids": IDS, "labels": IDS} if model.config.is_encoder_decoder else {"input_ids": IDS}


def logits(model):
    with torch.no_grad():
        return model.eval()(**inputs(model)).logits


@pytest.mark.parametrize("method", ["rigl", "chtss"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_train_export_and_load(tmp_path, name, method):
    architecture = ARCHITECTURES[name]
    expected = architecture.expected()
    run = trainer(name, tmp_path / "run", method)
    model, sparse = run.model, run.sparse
    assert {layer: tuple(mask.shape) for layer, mask in sparse.masks().items()} == expected
    biases = {
        layer: module.bias.detach().clone()
        for layer, module in sparse.layers.items()
        # the attention does not depend on a bias of all keys
        if module.bias is not None and not layer.endswith("k_proj")
    }
    invariants = Invariants(run, expected)
    run.add_callback(invariants)
    run.train()
    assert invariants.changed.keys() <= {2, 4, 6}
    assert set().union(*invariants.changed.values()) == expected.keys()
    assert sparse.links() == sum(round(out * inn * (1 - SPARSITY)) for out, inn in expected.values())
    assert bool(biases) == (name in ("gpt_neox", "gpt2", "opt", "marian"))
    for layer, before in biases.items():
        assert sparse.layers[layer].bias.ne(before).any(), layer

    directory = export_sparse(model, tmp_path / "export")
    plain = architecture.loader.from_pretrained(directory)
    again = load_sparse(directory)
    assert type(plain) is type(again) is type(model)
    assert SparseModel.of(plain) is None
    for layer, mask in sparse.masks().items():
        assert SparseModel.of(again).masks()[layer].equal(mask)
        weight = plain.get_submodule(layer).weight
        assert torch.count_nonzero(weight) <= sparse.layers[layer].links
        assert weight[~sparse.layers[layer].mask].eq(0).all()
    assert logits(plain).equal(logits(model))
    assert logits(again).equal(logits(model))
    for one in (model, plain, again):
        output, embedding = (one.get_submodule(n).weight for n in (architecture.output, architecture.embedding))
        assert (output.data_ptr() == embedding.data_ptr()) == architecture.tied
    loader = "AutoModelForSeq2SeqLM" if architecture.is_encoder_decoder else "AutoModelForCausalLM"
    assert f"model = {loader}.from_pretrained(" in (directory / "README.md").read_text()


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("chtss", {"per_head": True}),
        ("rigl", {"regrown_weights": "historical"}),
        ("set", {"regrown_adam": "per_weight_steps"}),
        ("gmp", {"initial_sparsity": 0.5}),
    ],
)
def test_resume_bit_for_bit(tmp_path, name, method, config):
    whole = trainer(name, tmp_path / "whole", method, config=config, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer(name, tmp_path / "resumed", method, ARCHITECTURES[name].model(seed=5), config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    for layer, mask in whole.sparse.masks().items():
        assert mask.equal(resumed.sparse.masks()[layer]), layer
        assert whole.topology.explored[layer].equal(resumed.topology.explored[layer]), layer
    for layer, stored in whole.topology.stored.items():
        assert stored.equal(resumed.topology.stored[layer]), layer
        assert stored.ne(0).any(), layer
    weights = resumed.model.state_dict()
    assert all(weights[key].equal(value) for key, value in whole.model.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "opt", "t5"])
def test_rigl_regrows_where_the_gradient_of_an_unmasked_copy_is_largest(tmp_path, name):
    run = trainer(name, tmp_path, model=ARCHITECTURES[name].without_dropout(), max_steps=4)
    seen = {}

    class Copies(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen["model"] = copy.deepcopy(run.model)

        def on_optimizer_step(self, args, state, control, **kwargs):
            seen["masks"] = {layer: mask.clone() for layer, mask in run.sparse.masks().items()}

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step != INTERVAL:
                return
            dense = seen["model"]
            SparseModel.of(dense).unsparsify()
            dense.zero_grad()
            dense(**seen["batch"]).loss.backward()
            for layer, mask in run.sparse.masks().items():
                gradient = dense.get_parameter(f"{layer}.weight").grad
                gradient = (gradient.t() if name == "gpt2" else gradient).abs()
                come = mask & ~seen["masks"][layer]
                assert come.any(), layer
                assert gradient[come].min() >= gradient[~mask].max() * (1 - 1e-4), layer
            seen["compared"] = True

    inner = run.training_step

    def training_step(model, batch, *rest):
        seen["batch"] = batch
        return inner(model, batch, *rest)

    run.training_step = training_step
    run.add_callback(Copies())
    run.train()
    assert seen["compared"]


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_percolation_where_the_coupling_is_known(tmp_path, name):
    run = trainer(name, tmp_path, "chts", config={"percolation": True})
    invariants = Invariants(run, ARCHITECTURES[name].expected())
    run.add_callback(invariants)
    run.train()
    assert invariants.changed
    assert all(0 < update["active_neurons_percolated"] <= 1 for update in run.topology.history)

"""Every architecture through the whole way: sparsify, train with evolution, export, load again, resume."""

import copy

import numpy
import pytest
import torch
from architecture import close, outputs
from architecture_trainer import INTERVAL, SPARSITY, STEPS, trainer
from safetensors.torch import load_file
from tiny_architectures import ARCHITECTURES
from transformers import TrainerCallback

from hf_chts import SparsityHandle, export_sparse, load_sparse

# keys: an attention does not depend on a bias of all of them
WITHOUT_BIAS = ("k_proj", "key", "k_lin", "key_proj", "k_head")
# one of each family is also trained with a sparsity that rises
RISING = ["llama_grouped", "gpt2", "mixtral", "t5", "mamba", "bert, masked", "vit"]
LLAMA_LIKE = ["llama", "llama_grouped", "mistral", "qwen3", "gemma3_text"]


class Invariants(TrainerCallback):
    """After each step, links as many as there should be, and nothing off them."""

    def __init__(self, run, name):
        self.run, self.architecture = run, ARCHITECTURES[name]
        self.expected = self.architecture.expected()
        self.changed = {}  # layers whose topology changed, by step

    def idle(self, name):
        return self.architecture.idle is not None and self.architecture.idle in name

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for name, layer in self.run.sparse.layers.items():
            gradient = layer.weight.grad
            if gradient is None:
                assert self.idle(name), name
                continue
            assert gradient[~layer.mask].eq(0).all(), name
            assert gradient[layer.mask].ne(0).any() or self.idle(name), name

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
            assert moments or self.idle(name), name
            for tensor in (layer.weight, *(moments[key] for key in ("exp_avg", "exp_avg_sq") if moments)):
                assert tensor[~layer.mask].eq(0).all(), name
        changed = {name for name, mask in self.run.sparse.masks().items() if not mask.equal(self.before[name])}
        if changed:
            self.changed[state.global_step] = changed


def shared(model):
    """The names of parameters that share their memory."""
    names = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(value.data_ptr(), set()).add(name)
    return [group for group in names.values() if len(group) > 1]


def nonzero(state, expected):
    """The number of weights that are not 0, by the name of their layer, of a state dict."""
    return {name: int(torch.count_nonzero(state[f"{name}.weight"])) for name in expected}


@pytest.mark.parametrize(
    ("name", "method"), [(name, "rigl") for name in ARCHITECTURES] + [(n, "chtss") for n in RISING]
)
def test_train_export_and_load(tmp_path, name, method):
    architecture = ARCHITECTURES[name]
    expected = architecture.expected()
    run = trainer(name, tmp_path / "run", method)
    model, sparse = run.model, run.sparse
    assert {layer: tuple(mask.shape) for layer, mask in sparse.masks().items()} == expected
    links = sum(nonzero(model.state_dict(), expected).values())  # random weights are not 0 by chance
    assert sparse.links() == links
    assert sparse.sparsity() == 1 - links / sum(out * inn for out, inn in expected.values())
    biases = {layer: module.bias.detach().clone() for layer, module in sparse.layers.items() if module.bias is not None}
    invariants = Invariants(run, name)
    run.add_callback(invariants)
    run.train()
    assert invariants.changed.keys() <= {2, 4, 6, 8}
    assert set().union(*invariants.changed.values()) == expected.keys()
    links = sum(round(out * inn * (1 - SPARSITY)) for out, inn in expected.values())
    assert sparse.links() == links
    assert run.evolver.history[-1]["sparsity"] == pytest.approx(sparse.sparsity(), abs=1e-4)
    for layer, before in biases.items():
        assert sparse.layers[layer].bias.ne(before).any() or layer.endswith(WITHOUT_BIAS) or invariants.idle(layer), (
            layer
        )

    batch = architecture.batch(2, seed=99)
    live, weights = outputs(model, batch), model.state_dict()
    for packed in (False, True):
        directory = export_sparse(model, tmp_path / f"export {packed}", packed=packed)
        plain = architecture.loader.from_pretrained(directory)
        again = load_sparse(directory)
        assert type(plain) is type(again) is type(model)
        assert SparsityHandle.of(plain) is None
        masks = SparsityHandle.of(again).masks()
        assert masks.keys() == expected.keys()
        for layer, mask in sparse.masks().items():
            assert masks[layer].equal(mask), layer
        for one in (plain, again):
            state = one.state_dict()
            assert state.keys() == weights.keys()
            assert all(state[key].equal(value) for key, value in weights.items())
            assert close(outputs(one, batch), live)
            assert shared(one) == shared(model)
            assert bool(shared(one)) == architecture.tied
        assert f"model = {architecture.task.auto}.from_pretrained(" in (directory / "README.md").read_text()
    resumed = trainer(name, tmp_path / "resumed", method, architecture.model(seed=5))
    resumed._load_from_checkpoint(str(tmp_path / "export False"))
    assert all(resumed.model.state_dict()[key].equal(value) for key, value in weights.items())
    bits = load_file(tmp_path / "export False/masks.safetensors")
    stored = {layer: int(numpy.unpackbits(bits[f"{layer}.mask"].numpy()).sum()) for layer in expected}
    assert sum(stored.values()) == links
    # a link may be 0, but hardly any is
    left = nonzero(weights, expected)
    assert all(left[layer] <= stored[layer] for layer in expected)
    assert sum(left.values()) > 0.9 * links


RESUMED = {
    "chtss": {"per_head": True},
    "rigl": {"regrown_weights": "historical"},
    "set": {"regrown_adam": "per_weight_steps"},
    "gmp": {"initial_sparsity": 0.5},
}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("gpt2", method) for method in RESUMED),
        ("t5", "chtss"),
        ("mixtral", "rigl"),
        ("llava", "set"),
        ("swin", "gmp"),
    ],
)
def test_resume_bit_for_bit(tmp_path, name, method):
    config = RESUMED[method]
    whole = trainer(name, tmp_path / "whole", method, config=config, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer(name, tmp_path / "resumed", method, ARCHITECTURES[name].model(seed=5), config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    for layer, mask in whole.sparse.masks().items():
        assert mask.equal(resumed.sparse.masks()[layer]), layer
        assert whole.evolver.explored[layer].equal(resumed.evolver.explored[layer]), layer
    for layer, stored in whole.evolver.state().stored.items():
        assert stored.equal(resumed.evolver.state().stored[layer]), layer
        assert stored.ne(0).any(), layer
    weights = resumed.model.state_dict()
    assert all(weights[key].equal(value) for key, value in whole.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "dropout"),
    [
        ("gpt2", ["resid_pdrop", "embd_pdrop", "attn_pdrop"]),
        ("opt", ["dropout", "attention_dropout"]),
        ("t5", ["dropout_rate"]),
    ],
)
def test_rigl_regrows_where_the_gradient_of_an_unmasked_copy_is_largest(tmp_path, name, dropout):
    model = ARCHITECTURES[name].model(**dict.fromkeys(dropout, 0.0))
    run = trainer(name, tmp_path, model=model, max_steps=4)
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
            SparsityHandle.of(dense).unsparsify()
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
    invariants = Invariants(run, name)
    run.add_callback(invariants)
    run.train()
    assert invariants.changed
    assert all(0 < update["active_neurons_percolated"] <= 1 for update in run.evolver.history)

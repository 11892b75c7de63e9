"""Weights that a model uses past the forward of their layers: the gradient is masked wherever it comes from."""

import copy
import pickle

import pytest
import torch
from cases import arguments, case_config, check_links, losses
from tiny import random_blocks
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import MambaConfig, MambaForCausalLM

from hf_chts import SparseTrainer, SparsityConfig, SparsityHandle, export_sparse, load_sparse, sparsify

X = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
CONFIG = SparsityConfig(method="static", sparsity=0.7)


class Block(nn.Module):
    """An autoencoder whose decoder is the encoder turned round, beside a product written by hand."""

    def __init__(self):
        super().__init__()
        self.encoder, self.mixer = nn.Linear(20, 24), nn.Linear(20, 20)

    def forward(self, x):
        hidden = self.encoder(x @ self.mixer.weight.t()).tanh()
        return functional.linear(hidden, self.encoder.weight.t()) + x


class Model(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def gradients(model, times=1):
    """Of the weights of linear layers, added up over so many backward passes."""
    model.zero_grad()
    for _ in range(times):
        model(X.clone().requires_grad_()).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if name.endswith("weight")}


@pytest.fixture(scope="module")
def dense():
    """Gradients of a dense model with the weights of a sparse one."""
    model = Model()
    sparsify(model, CONFIG).unsparsify()
    return gradients(model)


WAYS = {
    "as it is": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    "a deep copy": copy.deepcopy,
    "from a file": lambda model: pickle.loads(pickle.dumps(model)),
    "moved to another type and back": lambda model: model.double().float(),
    "frozen in between": lambda model: model.requires_grad_(False).requires_grad_(True),
}


def check(model, found, dense, times=1):
    layers = SparsityHandle.of(model).layers
    assert len(layers) == 4
    for name, layer in layers.items():
        gradient = found[f"{name}.weight"]
        assert gradient[~layer.mask].eq(0).all(), name
        torch.testing.assert_close(gradient, dense[f"{name}.weight"] * times * layer.mask)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_gradient(way, dense):
    model = Model()
    sparsify(model, CONFIG)
    model = way(model)
    found = {name.removeprefix("_orig_mod."): value for name, value in gradients(model, times=2).items()}
    check(model, found, dense, times=2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant, dense):
    model = Model(reentrant)
    sparsify(model, CONFIG)
    check(model, gradients(model), dense)


def test_masked_once_and_nothing_copied():
    """The gradient that arrives is the masked tensor itself: no pass over memory beside that of the mask."""
    model = Model()
    layer = sparsify(model, CONFIG).layers["blocks.0.encoder"]
    masked, arrived = [], []
    layer.weight.register_hook(lambda gradient: masked.append(gradient.data_ptr()))  # called after the layer's own
    layer.weight.register_post_accumulate_grad_hook(lambda weight: arrived.append(weight.grad.data_ptr()))
    model(X).square().sum().backward()
    assert masked == arrived
    assert len(arrived) == 1


def test_dense_gradient_is_of_all_uses(dense):
    model = Model()
    layers = sparsify(model, CONFIG).layers
    for layer in layers.values():
        layer.dense_gradient = torch.zeros_like(layer.weight)
    gradients(model)
    for name, layer in layers.items():
        torch.testing.assert_close(layer.dense_gradient, dense[f"{name}.weight"])


def test_a_weight_that_was_replaced_gets_its_hook_when_training_begins(dense):
    model = Model()
    sparse = sparsify(model, CONFIG)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    sparse.evolver(torch.optim.AdamW(model.parameters()), max_steps=1000)
    check(model, gradients(model), dense)


def test_dense_again():
    model = Model()
    sparse = sparsify(model, CONFIG)
    masks = {name: mask.clone() for name, mask in sparse.masks().items()}
    sparse.unsparsify()
    found = gradients(model)
    for name, mask in masks.items():
        assert found[f"{name}.weight"][~mask].ne(0).any()


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=8, expand=2)
    )


@pytest.mark.parametrize("case", ["rigl", "chtss"])
def test_mamba(tmp_path, case):
    """Its forward multiplies with dt_proj's weight itself."""
    targets = ["in_proj", "x_proj", "dt_proj", "out_proj"]

    def run(model):
        return SparseTrainer(
            model=model,
            args=arguments(tmp_path, save_steps=4, max_steps=8, update_warmup_steps=0),
            sparsity=case_config(case, target_modules=targets, sparsity=0.8, update_interval=2),
            train_dataset=random_blocks(16, 8),
        )

    whole = run(mamba())
    whole.train()
    check_links(whole.sparse, 0.8)
    assert len(whole.sparse.layers) == 8
    for name, layer in whole.sparse.layers.items():
        assert layer.weight[~layer.mask].eq(0).all(), name
        assert layer.weight[layer.mask].ne(0).any(), name
    again = run(mamba())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(again) == losses(whole)
    ids = torch.arange(16).view(2, 8)
    with torch.no_grad():
        expected = whole.model.eval()(input_ids=ids).logits
        assert load_sparse(export_sparse(whole.model, tmp_path / "export"))(input_ids=ids).logits.equal(expected)


def test_attention_of_torch():
    """It is the attention that multiplies with the weight of its output, whose class only has another name."""
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.TransformerEncoderLayer(32, 2, 48, dropout=0.0, batch_first=True)])
    sparse = sparsify(model, CONFIG)
    names = ["blocks.0.self_attn.out_proj", "blocks.0.linear1", "blocks.0.linear2"]
    assert list(sparse.layers) == names
    model.blocks[0](torch.randn(2, 5, 32)).square().sum().backward()
    for name, layer in sparse.layers.items():
        assert layer.weight.grad[~layer.mask].eq(0).all(), name
        assert layer.weight.grad[layer.mask].ne(0).all(), name

"""Linear layers that are of a class of the model's own."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers import FalconConfig, FalconForCausalLM

from hf_chts import SparsityConfig, SparsityHandle, export_sparse, load_sparse, sparsify
from hf_chts.layers.masked_linear import masked_class
from hf_chts.layers.own_classes import computes_a_product
from hf_chts.topology.random_streams import random_stream

MASK = torch.rand(6, 9, generator=random_stream(0)) < 0.4
X = torch.randn(5, 9, generator=random_stream(1))


class Marked(nn.Linear):
    """As torch's NonDynamicallyQuantizableLinear: another name, the same forward."""


class Turned(nn.Linear):
    """As Falcon's."""

    def forward(self, x):
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Standardized(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class Rounded(nn.Linear):
    """Only in training."""

    def forward(self, x):
        weight = self.weight
        if self.training:
            weight = weight + (weight.sign() * weight.abs().mean() - weight).detach()
        return functional.linear(x, weight, self.bias)


class Dropping(nn.Linear):
    def forward(self, x):
        return functional.dropout(super().forward(x), 0.5, self.training)


class Grouped(nn.Linear):
    def forward(self, x):
        return torch.einsum("...gi,goi->...go", x, self.weight.view(3, 2, 9)).flatten(-2)


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_a_linear_layer(bias):
    state = torch.get_rng_state()
    for kind in (nn.Linear, Marked, Turned):
        assert computes_a_product(kind(9, 6, bias=bias)), kind
        assert computes_a_product(kind(9, 6, bias=bias).bfloat16()), kind
    torch.set_rng_state(state)
    layers = [kind(9, 6, bias=bias) for kind in (Doubled, Standardized, Rounded, Dropping, Grouped)]
    state = torch.get_rng_state()
    for layer in layers:
        seen = []
        layer.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        before = [parameter.clone() for parameter in layer.parameters()]
        assert not computes_a_product(layer), layer
        assert all(value.equal(now) for value, now in zip(before, layer.parameters(), strict=True))
        assert not seen
    assert torch.get_rng_state().equal(state)


@pytest.fixture
def turned():
    torch.manual_seed(0)
    layer = Turned(9, 6)
    return masked_class(layer).convert(layer, MASK)


def test_forward_and_gradient(turned):
    assert isinstance(turned, Turned)
    reference = copy.deepcopy(turned).revert()
    assert type(reference) is Turned
    assert turned(X).equal(reference(X))
    turned(X).square().sum().backward()
    reference(X).square().sum().backward()
    assert turned.weight.grad.equal(reference.weight.grad * MASK)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(turned, copied):
    twin = copied(turned)
    assert type(twin) is type(turned)
    assert twin.mask.equal(MASK)
    twin(X).sum().backward()
    assert twin.weight.grad[~MASK].eq(0).all()
    assert turned.weight.grad is None


def test_other_weights_in_its_place(turned):
    given = turned.weight.detach().clone().requires_grad_()
    expected = turned(X)
    found = functional_call(turned, {"weight": given}, (X,))
    assert found.equal(expected)
    found.sum().backward()
    assert given.grad[~MASK].eq(0).all()
    assert given.grad[MASK].ne(0).all()
    assert turned.weight.grad is None
    assert isinstance(turned.weight, nn.Parameter)


def falcon():
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=96, hidden_size=24, num_attention_heads=3, num_hidden_layers=2, ffn_hidden_size=40, bias=True,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return FalconForCausalLM(config)


def test_falcon(tmp_path):
    model = falcon()
    sparse = sparsify(model, SparsityConfig(sparsity=0.8, method="static"))
    blocks = {name.split(".h.")[1] for name in sparse.layers}
    kinds = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert blocks == {f"{i}.{kind}" for i in (0, 1) for kind in kinds}
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, layer in sparse.layers.items():
        assert layer.weight.grad[~layer.mask].eq(0).all(), name
        assert layer.weight.grad[layer.mask].ne(0).any(), name
    expected = model.eval()(input_ids=ids).logits
    for packed in (False, True):
        again = load_sparse(export_sparse(model, tmp_path / str(packed), packed=packed))
        assert again(input_ids=ids).logits.equal(expected)
        assert SparsityHandle.of(again).masks().keys() == sparse.layers.keys()
    assert type(sparse.unsparsify().transformer.h[0].mlp.dense_h_to_4h) is type(
        falcon().transformer.h[0].mlp.dense_h_to_4h
    )

"""torch.func on masked layers: what it gives is that of a dense layer, 0 off the mask."""

import copy

import pytest
import torch
from tiny import VOCABULARY, tiny_llama
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from transformers.pytorch_utils import Conv1D

from hf_chts import MaskedConv1D, MaskedLinear, SparsityConfig, SparsityHandle, sparsify
from hf_chts.topology.random_streams import random_stream

MASK = torch.rand(6, 9, generator=random_stream(0)) < 0.4
X = torch.randn(5, 9, generator=random_stream(1))


@pytest.fixture(params=[MaskedLinear, MaskedConv1D])
def layers(request):
    """A masked layer and a dense one with its weights; the mask, as the weight lies."""
    torch.manual_seed(0)
    kind = request.param
    layer = kind.convert(nn.Linear(9, 6) if kind is MaskedLinear else Conv1D(6, 9), MASK)
    return layer, copy.deepcopy(layer).revert(), layer.mask.clone()


def weights(layer):
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


def loss(layer):
    return lambda parameters, x: functional_call(layer, parameters, (x,)).square().sum()


def test_grad(layers):
    masked, dense, mask = layers
    found, expected = (grad(loss(layer))(weights(layer), X) for layer in (masked, dense))
    assert found["weight"].equal(expected["weight"] * mask)
    assert found["bias"].equal(expected["bias"])


def test_gradients_of_each_sample(layers):
    masked, dense, mask = layers
    found = vmap(grad(loss(masked)), (None, 0))(weights(masked), X[:, None])
    for i, x in enumerate(X):
        dense.zero_grad()
        dense(x[None]).square().sum().backward()
        torch.testing.assert_close(found["weight"][i], dense.weight.grad * mask)
        torch.testing.assert_close(found["bias"][i], dense.bias.grad)


def test_vmap_over_layers_with_masks_of_their_own(layers):
    masked, _, _ = layers
    other = copy.deepcopy(masked)
    other.set_mask(~MASK)
    parameters, buffers = stack_module_state([masked, other])

    def one(parameters, buffers, x):
        return functional_call(masked, (parameters, buffers), (x,)).square().sum()

    outputs = vmap(one, (0, 0, None))(parameters, buffers, X)
    found = vmap(grad(one), (0, 0, None))(parameters, buffers, X)["weight"]
    for i, layer in enumerate((masked, other)):
        torch.testing.assert_close(outputs[i], layer(X).square().sum())
        layer(X).square().sum().backward()
        torch.testing.assert_close(found[i], layer.weight.grad)
        assert found[i][~layer.mask].eq(0).all()


def test_forward_mode(layers):
    masked, dense, mask = layers
    tangent = torch.randn(dense.weight.shape, generator=random_stream(2))

    def output(layer):
        return lambda weight: functional_call(layer, {"weight": weight, "bias": layer.bias}, (X,))

    weight = masked.weight.detach()
    value, change = jvp(output(masked), (weight,), (tangent,))
    expected = jvp(output(dense), (weight,), (tangent * mask,))
    assert value.equal(expected[0])
    torch.testing.assert_close(change, expected[1])
    torch.testing.assert_close(jacfwd(output(masked))(weight), jacrev(output(masked))(weight))


def test_dual_numbers(layers):
    masked, dense, mask = layers
    generator = random_stream(2)
    tangent, towards = (torch.randn(shape, generator=generator) for shape in (dense.weight.shape, X.shape))

    def output(layer):
        return lambda weight, x: functional_call(layer, {"weight": weight, "bias": layer.bias}, (x,))

    weight = masked.weight.detach()
    expected = jvp(output(dense), (weight, X), (tangent * mask, towards))
    leaf = weight.clone().requires_grad_()
    masked.dense_gradient = torch.zeros_like(weight)
    with forward_ad.dual_level():
        dual = output(masked)(forward_ad.make_dual(leaf, tangent), forward_ad.make_dual(X, towards))
        value, change = forward_ad.unpack_dual(dual)
        # and backward through both
        (first,) = torch.autograd.grad(value.square().sum(), leaf, retain_graph=True)
        (second,) = torch.autograd.grad(change.square().sum(), leaf)
        # a weight that is no dual number, in the same level
        (own,) = torch.autograd.grad(masked(X).square().sum(), masked.weight)
    assert value.equal(expected[0])
    torch.testing.assert_close(change, expected[1])

    def squared(part):
        return lambda w: jvp(output(dense), (w, X), (tangent * mask, towards))[part].square().sum()

    gradients = [grad(squared(part))(weight) for part in (0, 1)]
    torch.testing.assert_close(first, gradients[0] * mask)
    torch.testing.assert_close(second, gradients[1] * mask)
    torch.testing.assert_close(own, gradients[0] * mask)
    torch.testing.assert_close(masked.dense_gradient, 2 * gradients[0] + gradients[1])


def test_second_derivatives(layers):
    masked, dense, mask = layers

    def cubed(layer):
        return lambda weight: functional_call(layer, {"weight": weight, "bias": layer.bias}, (X,)).pow(3).sum()

    weight = masked.weight.detach()
    expected = hessian(cubed(dense))(weight) * mask[:, :, None, None] * mask
    torch.testing.assert_close(hessian(cubed(masked))(weight), expected)
    # and by two backward passes
    direction = torch.randn(weight.shape, generator=random_stream(3))
    (first,) = torch.autograd.grad(masked(X).pow(3).sum(), masked.weight, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), masked.weight)
    torch.testing.assert_close(second, torch.einsum("ijkl,ij->kl", expected, direction))


def test_compiled(layers):
    masked, dense, mask = layers
    sample = vmap(grad(loss(masked)), (None, 0))
    compiled = torch.compile(sample, backend="aot_eager")
    expected = vmap(grad(loss(dense)), (None, 0))(weights(dense), X[:, None])
    found = compiled(weights(masked), X[:, None])
    torch.testing.assert_close(found["weight"], expected["weight"] * mask)
    torch.testing.assert_close(found["bias"], expected["bias"])


def test_functional_call_with_other_weights(layers):
    masked, dense, mask = layers
    other = {name: (value * 2).requires_grad_() for name, value in weights(masked).items()}
    same = {name: value.detach().clone().requires_grad_() for name, value in other.items()}
    functional_call(masked, other, (X,)).square().sum().backward()
    functional_call(dense, same, (X,)).square().sum().backward()
    torch.testing.assert_close(other["weight"].grad, same["weight"].grad * mask)
    assert masked.weight.grad is None


def test_the_dense_gradient_is_of_what_reaches_the_weights(layers):
    masked, dense, _ = layers
    masked.dense_gradient = torch.zeros_like(masked.weight)
    grad(loss(masked))(weights(masked), X)
    vmap(grad(loss(masked)), (None, 0))(weights(masked), X)
    assert masked.dense_gradient.eq(0).all()  # results of their own
    loss(masked)(dict(masked.named_parameters()), X).backward()
    dense(X).square().sum().backward()
    torch.testing.assert_close(masked.dense_gradient, dense.weight.grad)


def test_masking_by_hook_holds_for_the_layer_s_own_weight_alone(layers):
    masked, dense, mask = layers
    masked.mask_by_hook()
    assert list(dict(masked.named_parameters())) == ["weight", "bias"]
    assert masked.masked_weight() is masked.weight
    expected = grad(loss(dense))(weights(dense), X)["weight"] * mask
    assert grad(loss(masked))(weights(masked), X)["weight"].equal(expected)
    other = {name: value.clone().requires_grad_() for name, value in weights(masked).items()}
    loss(masked)(other, X).backward()
    torch.testing.assert_close(other["weight"].grad, expected)
    loss(masked)(dict(masked.named_parameters()), X).backward()
    torch.testing.assert_close(masked.weight.grad, expected)


def test_a_frozen_weight_takes_no_hook_and_is_masked_when_it_trains_again(layers):
    masked, _, mask = layers
    masked.weight.requires_grad_(False)
    masked.mask_by_hook()
    masked(X).sum()
    masked.weight.requires_grad_(True)
    masked(X).sum().backward()
    assert masked.weight.grad[~mask].eq(0).all()
    assert masked.weight.grad[mask].ne(0).all()


def test_gradients_of_each_document_of_a_model():
    model = tiny_llama(attn_implementation="eager")
    masks = sparsify(model, SparsityConfig()).masks()
    dense = copy.deepcopy(model)
    SparsityHandle.of(dense).unsparsify()
    ids = torch.randint(0, VOCABULARY, (3, 8), generator=random_stream(4))
    causal = {"attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()}  # vmap cannot look at ids to make one

    def one(parameters, ids):
        return functional_call(model, parameters, (), {"input_ids": ids[None], **causal}).logits.square().mean()

    found = vmap(grad(one), (None, 0))(weights(model), ids)
    for i, document in enumerate(ids):
        dense.zero_grad()
        dense(input_ids=document[None], **causal).logits.square().mean().backward()
        for name, parameter in dense.named_parameters():
            mask = masks.get(name.removesuffix(".weight"), torch.tensor(True))
            torch.testing.assert_close(found[name][i], parameter.grad * mask, rtol=1e-3, atol=1e-6)

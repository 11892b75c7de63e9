"""MaskedLinear: forward as a dense layer with zeros, gradient 0 off the mask, there and back."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_chts import MaskedLinear
from hf_chts.topology.random_streams import random_stream

MASK = torch.rand(6, 9, generator=random_stream(0)) < 0.4


def layer(bias=True, mask=MASK):
    torch.manual_seed(0)
    return MaskedLinear.convert(nn.Linear(9, 6, bias=bias), mask)


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradient(bias):
    masked = layer(bias)
    reference = copy.deepcopy(masked).revert()
    x = torch.randn(4, 9, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    masked(x).square().sum().backward()
    functional.linear(y, reference.weight * MASK, reference.bias).square().sum().backward()
    assert masked(x).equal(reference(x))
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(masked.weight.grad, reference.weight.grad * MASK)
    assert masked.weight.grad[~MASK].eq(0).all()
    if bias:
        torch.testing.assert_close(masked.bias.grad, reference.bias.grad)


def test_an_infinite_gradient_stays_off_the_missing_links():
    masked = layer()
    (masked(torch.full((1, 9), float("inf"))).sum() * 0).backward()
    assert masked.weight.grad[~MASK].eq(0).all()
    assert not masked.weight.grad[MASK].isfinite().any()


def test_under_autocast_and_checkpointing():
    masked = layer()
    x = torch.randn(4, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.utils.checkpoint.checkpoint(masked, x, use_reentrant=False).sum().backward()
    assert masked.weight.grad.dtype == torch.float32
    assert masked.weight.grad[~MASK].eq(0).all()
    assert masked.weight.grad[MASK].ne(0).any()


def test_state_dict_is_that_of_a_plain_layer():
    assert list(layer().state_dict()) == ["weight", "bias"]
    assert list(copy.deepcopy(layer()).state_dict()) == ["weight", "bias"]


def test_converted_in_place_and_back():
    plain = nn.Linear(9, 6)
    weight, seen = plain.weight, []
    plain.register_forward_hook(lambda *_: seen.append(1))
    masked = MaskedLinear.convert(plain, MASK)
    assert masked is plain
    assert masked.weight is weight
    assert weight[~MASK].eq(0).all()
    assert masked.links == int(MASK.sum())
    masked(torch.randn(1, 9))
    assert seen == [1]
    again = masked.revert()
    assert type(again) is nn.Linear
    assert not list(again.buffers())
    again(torch.randn(2, 9)).sum().backward()
    assert again.weight.grad[~MASK].ne(0).any()
    MaskedLinear.convert(again, MASK)


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_conversion_that_swaps_parameters(swapping):
    masked = layer().double()
    assert masked.weight.dtype == torch.float64
    masked(torch.randn(3, 9, dtype=torch.float64)).sum().backward()
    assert masked.weight.grad[~MASK].eq(0).all()
    assert masked.weight.grad[MASK].ne(0).all()
    assert masked.masked_weight() is masked.weight  # masked once, by the hook


def test_set_mask_zeroes_what_leaves_and_keeps_the_buffer():
    masked = layer(mask=torch.ones(6, 9, dtype=torch.bool))
    buffer = masked.mask
    masked.set_mask(MASK)
    assert masked.mask is buffer
    assert masked.weight[~MASK].eq(0).all()
    assert masked.weight[MASK].ne(0).all()


@pytest.mark.parametrize("mask", [MASK.float(), MASK.t(), MASK[:5]])
def test_wrong_masks_are_refused(mask):
    with pytest.raises(ValueError, match=r"the mask of this layer is bool \(6, 9\)"):
        layer(mask=mask)


def test_subclasses_are_refused():
    class Special(nn.Linear):
        pass

    with pytest.raises(TypeError, match="got Special"):
        MaskedLinear.convert(Special(9, 6), MASK)


def test_compiled():
    masked = layer()
    compiled = torch.compile(masked, backend="aot_eager")
    x = torch.randn(3, 9)
    torch.testing.assert_close(compiled(x), masked(x))
    compiled(x).sum().backward()
    assert masked.weight.grad[~MASK].eq(0).all()


def test_masking_by_hook_gives_the_forward_the_weight_itself():
    # a view would keep the weights that DeepSpeed's stage 3 has gathered until the backward
    torch.manual_seed(0)
    mask = torch.rand(5, 7) < 0.5
    layer = MaskedLinear.convert(nn.Linear(7, 5), mask)
    inputs = torch.randn(3, 7)
    layer(inputs).square().sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    layer.mask_by_hook()
    assert layer.masked_weight() is layer.weight
    layer.dense_gradient = torch.zeros(5, 7)
    layer(inputs).square().sum().backward()
    assert layer.weight.grad.equal(expected)
    assert layer.dense_gradient[mask].equal(expected[mask])
    assert layer.dense_gradient[~mask].count_nonzero()
    plain = layer.revert()
    plain.weight.grad = None
    plain(inputs).square().sum().backward()
    assert plain.weight.grad[~mask].count_nonzero()


def test_a_replica_of_data_parallel_is_masked_where_its_gradient_is_added_up():
    masked = layer()
    masked.dense_gradient = torch.zeros(6, 9)
    inputs = torch.randn(4, 9)
    replicas = [masked._replicate_for_data_parallel() for _ in range(2)]
    outputs = []
    for replica, part in zip(replicas, inputs.chunk(2), strict=True):
        replica.weight, replica.bias = masked.weight * 1.0, masked.bias * 1.0  # as torch's broadcast of them
        assert replica.masked_weight() is replica.weight
        outputs.append(replica(part))
    torch.cat(outputs).square().sum().backward()
    dense = copy.deepcopy(masked).revert()
    dense.zero_grad()
    dense(inputs).square().sum().backward()
    torch.testing.assert_close(masked.weight.grad, dense.weight.grad * MASK)
    torch.testing.assert_close(masked.dense_gradient, dense.weight.grad)

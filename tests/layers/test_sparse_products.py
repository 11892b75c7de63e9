"""Products of a layer with its links alone: those of a dense weight in double precision, within rounding."""

import logging

import pytest
import torch
from sparse_cases import close, dense, layer, random_mask
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from hf_chts import kernels
from hf_chts.layers import csr_products, link_index, sparse_products, tiles
from hf_chts.layers.sparse_products import sparse_product

pytest.importorskip("numba")

TOKENS = [(1,), (2,), (16,), (17,), (3, 11), (64,), (65,), (130,), (2, 100)]
MASKS = {
    "some": random_mask(37, 53, 0.1),
    "whole tiles": random_mask(64, 48, 0.2),
    "one": torch.ones(1, 1, dtype=torch.bool),
    "none": torch.zeros(20, 35, dtype=torch.bool),
    "one link": torch.arange(20 * 35).view(20, 35) == 123,
    "all": torch.ones(19, 33, dtype=torch.bool),
    "empty rows and columns": random_mask(40, 40, 0.3)
    & torch.outer(torch.arange(40) % 4 > 0, torch.arange(40) % 3 > 0),
}


def both(case, tokens, dtype=torch.float32, bias=True, multiply=sparse_product):
    x, values, given = case.inputs(tokens, dtype, bias)
    result = multiply(x, values, given, case.index)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    result.backward(grad)
    vacant = case.positions == case.shape[0] * case.shape[1]
    assert not values.grad[vacant].any()
    found = [result, *(leaf.grad for leaf in (x, values, given) if leaf is not None)]
    return found, dense(case, x, values, given, grad)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_equals_the_dense_product(tokens, mask, transposed):
    for dtype in (torch.float32, torch.bfloat16):
        case = layer(MASKS[mask], transposed=transposed)
        close(*both(case, tokens, dtype, bias=mask != "some"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_in_several_blocks(monkeypatch, dtype):
    monkeypatch.setattr(link_index, "_second_cache", lambda: 2 * 64 * 64 * 4)  # tiles of 64 features
    case = layer(random_mask(150, 200, 0.1))
    assert (case.index.forward.blocks, case.index.backward.blocks) == (4, 3)
    for tokens in ((5,), (130,)):
        close(*both(case, tokens, dtype), dtype)


def test_columns_of_more_than_sixteen_bits():
    mask = torch.zeros(3, 70_000, dtype=torch.bool)
    mask[:, [0, 65_535, 65_536, 69_999]] = True
    case = layer(mask)
    assert case.index.forward.columns.dtype == torch.int32
    assert case.index.backward.columns.dtype == torch.int16
    close(*both(case, (3,)))


def test_any_number_of_threads_gives_the_same_bits():
    case, found = layer(random_mask(200, 300, 0.2)), []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            found.append(both(case, (200,))[0])
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(mine.equal(theirs) for mine, theirs in zip(found[0], other, strict=True))


def test_inputs_and_gradients_that_are_not_contiguous():
    case = layer(random_mask(32, 48, 0.2))
    x, values, _ = case.inputs((6, 5))
    turned = x.detach().transpose(0, 1).requires_grad_()
    spread = torch.zeros(5, 6, 96)
    spread[..., ::2] = turned.detach()
    grad = torch.randn(32, 6, 5).permute(2, 1, 0)
    for given in (turned, spread[..., ::2].requires_grad_()):
        values.grad = None
        result = sparse_product(given, values, None, case.index)
        found = [result, *torch.autograd.grad(result, (given, values), grad)]
        close(found, dense(case, turned, values, None, grad))


def test_numbers_too_small_to_be_normal_are_taken_for_zero():
    case = layer(torch.ones(16, 16, dtype=torch.bool), vacant=0)
    x = torch.full((20, 16), 1e-39)
    assert (x > 0).all()
    assert not sparse_product(x, torch.full((256,), 1e30), None, case.index).any()
    assert (x > 0).all()  # and the thread is as it was
    assert float(x[0, 0] + x[0, 1]) > 0
    values = torch.full((256,), 1e-25, requires_grad=True)
    small = torch.full((20, 16), 1e-20, requires_grad=True)
    result = sparse_product(small, values, None, case.index)
    result.backward(torch.full_like(result, 1e-25))
    assert not result.any()
    assert not small.grad.any()
    assert not values.grad.any()


def test_products_of_one_input_share_its_tiles(monkeypatch):
    case = layer(random_mask(32, 48, 0.2))
    x, values, bias = case.inputs((40,))
    cuts = []
    monkeypatch.setattr(tiles, "cut_tokens", lambda x: cuts.append(x.shape) or cut(x))
    cut = sparse_products.cut_tokens
    leaf, x = x, x * 1
    first, second = sparse_product(x, values, bias, case.index), sparse_product(x, values, None, case.index)
    assert cuts == [(40, 48)]
    (first + second).sum().backward()
    _, once, *_ = dense(case, x, values, bias, torch.ones(40, 32))
    close([leaf.grad], [2 * once])
    with torch.no_grad():
        x += 1
    sparse_product(x, values, bias, case.index)
    assert len(cuts) == 2  # another version of it
    with torch.no_grad():
        sparse_product(x, values, bias, case.index)
    assert len(cuts) == 3  # without a graph
    del x, first, second
    assert tiles._shared.last is None  # tiles go with their input


def test_under_autocast():
    case = layer(random_mask(32, 48, 0.2))
    x, values, bias = case.inputs((40,))
    with torch.autocast("cpu", torch.bfloat16):
        result = sparse_product(x, values, bias, case.index)
    assert result.dtype == torch.bfloat16
    grad = torch.randn(40, 32).bfloat16()
    result.backward(grad)
    assert {leaf.grad.dtype for leaf in (x, values, bias)} == {torch.float32}
    expected = dense(case, x.bfloat16(), values.bfloat16(), bias.bfloat16(), grad)
    close([leaf.bfloat16() for leaf in (result, x.grad, values.grad, bias.grad)], expected, torch.bfloat16)


def test_activation_checkpointing():
    case = layer(random_mask(32, 48, 0.2))
    x, values, bias = case.inputs((40,))
    result = checkpoint(lambda x: sparse_product(x, values, bias, case.index), x, use_reentrant=False)
    grad = torch.randn(40, 32)
    result.backward(grad)
    close([result, x.grad, values.grad, bias.grad], dense(case, x, values, bias, grad))


def test_compiled_and_exported():
    case = layer(random_mask(32, 48, 0.2))

    class Twice(torch.nn.Module):
        def forward(self, x, values, bias):
            return sparse_product(x, values, bias, case.index) * 2 + sparse_product(x, values, None, case.index)

    x, values, bias = case.inputs((4, 10))
    expected = Twice()(x, values, bias)
    grad = torch.randn(expected.shape)
    wanted = torch.autograd.grad(expected, (x, values, bias), grad)
    found = torch.compile(Twice(), fullgraph=True, backend="aot_eager")(x, values, bias)
    gradients = torch.autograd.grad(found, (x, values, bias), grad)
    for mine, other in zip((found, *gradients), (expected, *wanted), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    exported = torch.export.export(Twice(), (x.detach(), values.detach(), bias.detach()))
    assert exported.module()(x, values, bias).equal(expected)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    some = (torch.randn(5, 20, 48), values.detach(), bias.detach())
    of_any_size = torch.export.export(Twice(), some, dynamic_shapes=(sizes, None, None)).module()
    more = torch.randn(7, 30, 48)
    assert of_any_size(more, values, bias).equal(Twice()(more, values, bias))


def test_operators_keep_the_rules_of_torch():
    case = layer(random_mask(24, 20, 0.3))
    x, values, bias = case.inputs((18,))
    there = (*case.index.forward.tensors, *case.index.backward.tensors)
    blocks = (case.index.forward.block, case.index.backward.block)
    torch.library.opcheck(torch.ops.hf_chts.cut_tokens, (x,))
    cut = tiles.cut_tokens(x.detach()).requires_grad_()
    torch.library.opcheck(torch.ops.hf_chts.uncut_tokens, (cut.detach(), 18))
    torch.library.opcheck(torch.ops.hf_chts.multiply_links, (cut, values, bias, *there, 24, 20, *blocks, 18))


def test_inputs_from_outside_may_change_with_nobody_counting():
    case = layer(random_mask(24, 20, 0.3))
    x, values, bias = case.inputs((18,))
    x = x.detach()
    sparse_product(x, values, bias, case.index)
    x.data += 1
    result = sparse_product(x, values, bias, case.index)
    close([result], dense(case, x, values, bias, torch.ones(18, 24))[:1])
    sparse_product(x.requires_grad_(), values, bias, case.index).sum().backward()
    close([x.grad], dense(case, x, values, bias, torch.ones(18, 24))[1:2])
    with torch.inference_mode():
        close([sparse_product(x * 1, values, bias, case.index)], [result.double()])


def test_what_is_returned_may_be_written_into():
    case = layer(random_mask(24, 20, 0.3))
    x, values, bias = case.inputs((3, 6))
    result = sparse_product(x, values, bias, case.index).mul_(2)
    result.sum().backward()
    close([x.grad], dense(case, x, values, bias, torch.full((3, 6, 24), 2.0))[1:2])


def test_modes_that_see_operators_see_these():
    case = layer(random_mask(24, 20, 0.3))
    x, values, bias = case.inputs((18,))
    traced = make_fx(lambda x: sparse_product(x, values, bias, case.index))(x.detach())
    other = torch.randn(18, 20)
    assert traced(other).equal(sparse_product(other, values, bias, case.index))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert sparse_product(torch.empty(7, 20), values, bias, case.index).shape == (7, 24)


def test_what_it_cannot_do_is_said():
    case = layer(random_mask(24, 20, 0.3))
    x, values, bias = case.inputs((18,))
    with pytest.raises(RuntimeError, match="20 inputs got 21"):
        sparse_product(torch.zeros(18, 21), values, bias, case.index)
    with pytest.raises(RuntimeError, match="set compute: dense for gradients of gradients"):
        torch.autograd.grad(sparse_product(x, values, bias, case.index).sum(), x, create_graph=True)
    result = sparse_product(x, values, bias, case.index)
    case.index.refresh(case.positions, False, 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("transposed", [False, True])
def test_without_numba_by_torchs_own_products(monkeypatch, caplog, transposed):
    monkeypatch.setattr(kernels, "available", lambda: False)
    csr_products._say.cache_clear()
    with caplog.at_level(logging.WARNING):
        for mask in MASKS.values():
            for tokens in ((1,), (3, 11)):
                close(*both(layer(mask, transposed=transposed), tokens))
    assert [record.message.partition(",")[0] for record in caplog.records] == ["compute: sparse runs without numba"]

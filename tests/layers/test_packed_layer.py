"""Products with packed links, against those of the dense weight in double precision."""

import copy
import io
from unittest import mock

import pytest
import torch
from packed_cases import CASES, TOLERANCE, weight_of
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_chts.layers import packed_products
from hf_chts.layers.lanes import arrange
from hf_chts.layers.packed_layer import PackedLinear, packed_class
from hf_chts.layers.row_links import RowLinks

TOKENS = [1, 2, 3, 5, 8, 9, 16, 17, 64, 65, 130]


def packed(mask, weight, bias=None, kind=nn.Linear):
    out, inputs = mask.shape
    if kind is Conv1D:
        layer, mask, weight = Conv1D(out, inputs), mask.t(), weight.t()
    else:
        layer = kind(inputs, out, bias=bias is not None)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    layer = packed_class(type(layer)).attach(layer, int(mask.sum()))
    layer.pack(mask, weight[mask])
    return layer.requires_grad_(False)


@pytest.fixture(params=["numba", "torch"])
def way(request, monkeypatch):
    if request.param == "numba":
        pytest.importorskip("numba")
        assert packed_products._loops() is not None
    else:
        monkeypatch.setattr(packed_products, "_loops", lambda: None)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_products_are_those_of_the_dense_weight(way, dtype, case, kind):
    mask, weight = weight_of(case, dtype)
    bias = torch.randn(len(mask)).to(dtype)
    layer = packed(mask, weight, bias, kind)
    assert layer.weight.equal(weight.t() if kind is Conv1D else weight)
    assert layer.links == mask.sum()
    for tokens in TOKENS:
        x = torch.randn(tokens, mask.shape[1]).to(dtype)
        found = layer(x)
        assert found.dtype == dtype
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), x.double() @ weight.double().t() + bias, **TOLERANCE[dtype])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    mask, weight = torch.rand(3000, 200) < 0.2, torch.randn(3000, 200)
    layer, before = packed(mask, weight), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens in (1, 20):
            x = torch.randn(tokens, 200)
            torch.testing.assert_close(layer(x), x @ (weight * mask).t(), rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_inputs_of_any_layout(way):
    mask, weight = weight_of("some")
    layer = packed(mask, weight)
    for x in (torch.randn(72, 3).t(), torch.randn(4, 2, 144)[:, :, ::2], torch.randn(72), torch.randn(0, 72)):
        torch.testing.assert_close(layer(x), x @ weight.t(), rtol=1e-5, atol=1e-4)
    with pytest.raises(RuntimeError, match="72 inputs got 71"):
        layer(torch.randn(2, 71))


def test_dtypes_mix(way):
    mask, weight = weight_of("some", torch.bfloat16)
    layer, x = packed(mask, weight), torch.randn(2, 72)
    for dtype in (torch.float32, torch.float64, torch.float16):
        found = layer(x.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), x @ weight.float().t(), rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.half()(x).dtype == torch.float32
    assert layer.packed_values.dtype == torch.float16
    assert layer.double()(x.double()).dtype == torch.float64


def test_gradients_reach_the_input(way):
    mask, weight = weight_of("some")
    layer, x = packed(mask, weight), torch.randn(3, 72, requires_grad=True)
    layer(x).square().sum().backward()
    expected = 2 * (x.detach() @ weight.t()) @ weight
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.vmap(layer)(x), x @ weight.t(), rtol=1e-4, atol=1e-4)


def test_zeros_among_the_values_and_what_is_next_to_a_gap():
    mask = torch.zeros(2, 700, dtype=torch.bool)
    mask[0, [0, 255, 511, 699]] = True  # gaps of 255, 256 and 188
    mask[1, 300] = True
    values = torch.tensor([1.0, 0.0, 3.0, 4.0, 5.0]).bfloat16()
    links = arrange(*mask.nonzero(as_tuple=True), values, (2, 700))
    assert links.gaps.dtype == torch.uint8
    # the first row has four links and a bridge, the second a bridge and a link
    assert links.starts.tolist() == [0, 5]
    assert links.rows[0, :3].tolist() == [0, 1, -1]
    assert links.gaps[:, 0].tolist() == [0, 255, 255, 1, 188]
    assert links.values[:, 0].tolist() == [1, 0, 0, 3, 4]
    assert links.gaps[:2, 1].tolist() == [255, 45]


def test_memory_is_that_of_a_packed_file():
    mask = torch.rand(1000, 2048) < 0.1
    layer = packed(mask, torch.randn(mask.shape).bfloat16())
    file = 2 * int(mask.sum()) + mask.numel() // 8
    assert sum(buffer.nbytes for buffer in layer.buffers()) < 1.02 * file
    assert not list(layer.parameters())


def test_a_layer_that_is_moved_is_packed_for_its_device():
    mask, weight = weight_of("some")
    layer = packed(mask, weight)
    on_cpu = {name: value.clone() for name, value in layer.named_buffers()}
    rows = RowLinks.of(*mask.nonzero(as_tuple=True), weight[mask], tuple(mask.shape))
    layer._take(rows)  # as on a GPU
    assert layer.weight.equal(weight)
    x = torch.randn(2, 72)
    torch.testing.assert_close(layer(x), x @ weight.t(), rtol=1e-5, atol=1e-4)
    layer.cpu()
    assert {name: value.tolist() for name, value in layer.named_buffers()} == {
        name: value.tolist() for name, value in on_cpu.items()
    }


def test_copies_pickles_and_state_dicts():
    mask, weight = weight_of("some")
    layer, x = packed(mask, weight, torch.randn(len(mask))), torch.randn(2, 72)
    expected = layer(x)
    assert copy.deepcopy(layer)(x).equal(expected)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)(x).equal(expected)
    other = packed(mask, torch.zeros_like(weight), torch.zeros(len(mask)))
    other.load_state_dict(layer.state_dict())
    assert other(x).equal(expected)


class _Own(nn.Linear):
    def forward(self, x):
        return x @ self.weight.t() * 2


def test_a_layer_of_a_models_own_kind_keeps_its_forward():
    mask, weight = weight_of("some")
    layer, x = packed(mask, weight, kind=_Own, bias=torch.zeros(40)), torch.randn(2, 72)
    torch.testing.assert_close(layer(x), x @ weight.t() * 2)
    assert copy.deepcopy(layer)(x).equal(layer(x))
    assert isinstance(layer, PackedLinear)


def test_layers_that_read_one_input_are_multiplied_together():
    mask, weight = weight_of("some")
    q, k, v = (packed(mask, weight * factor, torch.randn(len(mask))) for factor in (1, 2, 3))
    lone = packed(mask, weight)
    with mock.patch("hf_chts.layers.shared_inputs.products", side_effect=packed_products.products) as calls:

        def ask(*layers, x=None):
            calls.reset_mock()
            x = torch.randn(1, 72) if x is None else x
            for layer in layers:
                expected = x @ layer.weight.t() + (0 if layer.bias is None else layer.bias)
                torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
            return calls.call_count

        assert ask(q, k, v) == 3
        assert ask(lone) == 1
        assert ask(q, k, v) == 1
        assert ask(k, q, v) == 1
        x = torch.randn(1, 72)
        assert ask(q, x=x) == 1
        x += 1  # what waits for the others is of another input
        assert ask(k, x=x) == 1
        assert ask(q, k, v) == 3  # no longer together


def test_a_compiler_takes_the_products_as_they_are():
    mask, weight = weight_of("some")
    layer, x = packed(mask, weight, torch.randn(len(mask))), torch.randn(3, 72)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    exported = torch.export.export(layer, (x,))
    assert "hf_chts.packed_products" in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), layer(x))
    arguments = (x.requires_grad_(), list(layer.packed.tensors), [40], 72, [layer.bias])
    torch.library.opcheck(packed_products.packed_products, arguments)


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (4, 16), (130, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_layers_multiply_one_token(shape, dtype):
    pytest.importorskip("numba")
    torch.manual_seed(0)
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    for x in (torch.randn(1, 1, shape[1]).to(dtype), torch.randn(shape[1])):
        expected = x.double() @ weight.double().t() + bias
        found = packed_products.dense_product(x, weight, bias)
        assert found.dtype == x.dtype
        torch.testing.assert_close(found.double(), expected, **TOLERANCE[x.dtype])
        found = packed_products.dense_product(x, weight, None)
        torch.testing.assert_close(found.double(), expected - bias, **TOLERANCE[x.dtype])
    # torch takes several tokens, other layouts and other dtypes
    assert packed_products.dense_product(torch.randn(2, shape[1]), weight, bias) is None
    assert packed_products.dense_product(torch.randn(shape[1]).half(), weight, bias) is None
    assert packed_products.dense_product(torch.randn(shape[0] + 1), weight.t(), None) is None


def test_without_numba_it_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr("hf_chts.kernels.available", lambda: False)
    packed_products._loops.cache_clear()
    try:
        mask, weight = weight_of("some")
        for _ in range(2):
            packed(mask, weight)(torch.randn(1, 72))
    finally:
        packed_products._loops.cache_clear()
    assert caplog.text.count("numba is missing") == 1

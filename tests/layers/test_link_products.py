"""Products of layers without a dense weight: results and gradients are those of the dense weight, bit for bit."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from hf_chts.layers import weight_parts
from hf_chts.layers.link_products import fill, product
from hf_chts.layers.weight_parts import Slots

OUT, IN = 48, 33


def case(transposed=False, bias=True, dtype=torch.float32, batch=(4, 7), vacant=0, block=0):
    """(slots, dense weight, values, input, bias), the last four to be differentiated by."""
    generator = torch.Generator().manual_seed(0)
    shape = (IN, OUT) if transposed else (OUT, IN)
    mask = torch.rand(shape, generator=generator) < 0.2
    numel = OUT * IN
    positions = torch.cat([mask.flatten().nonzero().flatten(), torch.full((vacant,), numel)]).int()
    positions = positions[torch.randperm(len(positions), generator=generator)]
    weight = torch.randn(shape, generator=generator).to(dtype).where(mask, 0)
    values = torch.cat([weight.flatten(), weight.new_zeros(1)])[positions.long()]
    order = positions.argsort().int() if block else None
    x = torch.randn(*batch, IN, generator=generator).to(dtype)
    given_bias = torch.randn(OUT, generator=generator).to(dtype).requires_grad_() if bias else None
    leaves = [tensor.requires_grad_() for tensor in (weight, values, x)]
    return Slots(positions, shape, transposed, order, block), *leaves, given_bias


def dense_product(slots, weight, x, bias):
    if not slots.transposed:
        return functional.linear(x, weight, bias)
    rows = x.view(-1, IN)
    product = torch.addmm(bias, rows, weight) if bias is not None else rows.mm(weight)
    return product.view(*x.shape[:-1], OUT)


def at_slots(slots, matrix):
    return torch.cat([matrix.flatten(), matrix.new_zeros(1)])[slots.positions.long()]


def both(slots, weight, values, x, bias, multiply=product, autocast=False, **options):
    """(result, gradients by input, values and bias) of the dense weight and of the links."""
    found = []
    for linked in (False, True):
        mine = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in (weight, values, x, bias)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if linked:
                result = multiply(mine[2], mine[1], slots, mine[3], **options)
            else:
                result = dense_product(slots, mine[0], mine[2], mine[3])
        grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
        result.backward(grad)
        of_values = mine[1].grad if linked else at_slots(slots, mine[0].grad)
        found.append([result, mine[2].grad, of_values, *([] if bias is None else [mine[3].grad])])
        if not linked:
            found.append(mine[0].grad)
    return found[0], found[2], found[1]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"vacant": 9}, {"batch": (5,)}, {"batch": (2, 3, 4)}, {"batch": ()}])
def test_the_same_bits_as_with_the_dense_weight(transposed, bias, dtype, options):
    if transposed and options.get("batch") == ():
        pytest.skip("Conv1D takes no vector")
    slots, *tensors = case(transposed, bias, dtype, **options)
    total = torch.zeros(slots.shape, dtype=dtype)
    dense, linked, dense_gradient = both(slots, *tensors, dense_gradient=total)
    assert all(a.equal(b) for a, b in zip(dense, linked, strict=True))
    assert total.equal(dense_gradient)


@pytest.mark.parametrize("transposed", [False, True])
def test_autocast(transposed):
    slots, *tensors = case(transposed, vacant=3)
    dense, linked, _ = both(slots, *tensors, autocast=True)
    assert linked[0].dtype == torch.bfloat16
    assert linked[2].dtype == torch.float32
    assert all(a.equal(b) for a, b in zip(dense, linked, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("block", [1, 5, 100])
def test_in_blocks_of_rows(transposed, block):
    slots, *tensors = case(transposed, vacant=4, block=block)
    total = torch.zeros(slots.shape)
    dense, linked, dense_gradient = both(slots, *tensors, dense_gradient=total)
    for a, b in zip(dense, linked, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(total, dense_gradient)
    values = linked[2]
    assert values[slots.positions == OUT * IN].eq(0).all()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled(backend):
    torch._dynamo.reset()
    for transposed in (False, True):
        slots, *tensors = case(transposed, vacant=3)
        compiled = torch.compile(product, backend=backend, fullgraph=True)
        dense, linked, _ = both(slots, *tensors, multiply=compiled)
        for a, b in zip(dense[:3], linked[:3], strict=True):
            assert a.equal(b)
        torch.testing.assert_close(dense[3], linked[3])  # a sum of the compiler's own


def test_exported():
    slots, _, values, x, _ = case()

    class Layer(torch.nn.Module):
        def forward(self, x, values):
            return product(x, values, slots)

    exported = torch.export.export(Layer(), (x.detach(), values.detach()))
    assert any("linked_product" in str(node.target) for node in exported.graph.nodes)
    assert exported.module()(x.detach(), values.detach()).equal(product(x, values, slots))


def test_gradients_can_be_differentiated():
    for transposed in (False, True):
        slots, _, values, x, bias = case(transposed, dtype=torch.float64, batch=(3,), vacant=2)
        linked = (x, values, bias)
        assert torch.autograd.gradgradcheck(lambda x, v, b, s=slots: product(x, v, s, b), linked)
        assert torch.autograd.gradcheck(lambda x, v, b, s=slots: product(x, v, s, b), linked)


def test_nothing_dense_is_kept_for_the_backward_pass():
    slots, _, values, x, bias = case()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        product(x, values, slots, bias)
    assert {tensor.numel() for tensor in kept} == {x.numel(), values.numel()}


def test_only_what_is_needed():
    slots, _, values, x, _ = case(bias=False)
    frozen = values.detach()
    product(x, frozen, slots).sum().backward()
    assert x.grad is not None
    product(x.detach(), values, slots).sum().backward()
    assert values.grad is not None


def test_fill():
    slots, weight, values, *_ = case(vacant=2)
    dense = fill(values, slots)
    assert dense.equal(weight)
    dense.square().sum().backward()
    assert values.grad.equal(at_slots(slots, 2 * weight.detach()))


def test_after_inference_mode_and_fake_tensors():
    """Memory that products share is not left to a mode that was on when it was made."""
    slots, _, values, x, bias = case()
    weight_parts._kept.__dict__.clear()
    with torch.inference_mode():
        product(x, values, slots, bias)
    with FakeTensorMode(allow_non_fake_inputs=True):
        product(x, values, slots, bias)
    expected = functional.linear(x, fill(values, slots), bias)
    result = product(x, values, slots, bias)
    torch.testing.assert_close(result, expected)
    result.sum().backward()


def test_the_gradient_of_a_transposed_input_is_contiguous():
    """As compiled models are told."""
    slots, _, values, _, _ = case(bias=False)
    x = torch.randn(IN, 5).t()
    of_x, _ = torch.ops.hf_chts.linked_product_gradients(
        torch.randn(5, OUT), x, values.detach(), slots.positions, None, *slots.shape, False, 0
    )
    assert not x.is_contiguous()
    assert of_x.is_contiguous()

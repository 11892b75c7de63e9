"""Triton's kernels, by its interpreter on the CPU. On a GPU: tests/training/test_gpu.py."""

import importlib
import sys
from unittest import mock

import pytest
import torch
from test_link_products import IN, OUT, both, case

from hf_chts.layers import weight_parts
from hf_chts.layers.weight_parts import Slots

pytest.importorskip("triton")

NAME = "hf_chts.layers.triton_kernels"


@pytest.fixture
def kernels(monkeypatch):
    """The kernels, interpreted, and taken for the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sys.modules.pop(NAME, None)  # what Triton compiles and what it interprets is decided on import
    interpreted = importlib.import_module(NAME)
    monkeypatch.setattr(weight_parts, "kernels", lambda kind: interpreted)
    yield interpreted
    sys.modules.pop(NAME)


@pytest.mark.parametrize("stride", [5, 8])
@pytest.mark.parametrize("slots", [1, 7, 1500])
def test_links_are_written_and_read(kernels, stride, slots):
    rows, columns = 700, 5
    generator = torch.Generator().manual_seed(slots)
    positions = torch.randperm(rows * columns, generator=generator)[:slots].int()
    values = torch.randn(slots, generator=generator)
    positions[slots // 2] = rows * columns  # has no link
    matrix = torch.zeros(rows + 1, stride)
    kernels.write(matrix, positions, values, (rows, columns))
    expected = torch.zeros(rows * columns + 1).index_put((positions.long(),), values)[:-1].view(rows, columns)
    assert matrix[:rows, :columns].equal(expected)
    assert matrix.count_nonzero() == expected.count_nonzero()
    found = torch.full((slots,), 7.0)
    kernels.read(matrix + 1, positions, found, (rows, columns))
    assert found.equal(torch.where(positions == rows * columns, 0, values + 1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_dense_weight(kernels, transposed, bias, dtype):
    slots, *leaves = case(transposed, bias, dtype, vacant=3)
    assert slots.padded(leaves[2])[not transposed] == (40 if dtype == torch.bfloat16 else IN)
    with mock.patch.object(kernels, "write", wraps=kernels.write) as write:
        dense, linked, _ = both(slots, *leaves)
    assert write.call_count == 2
    for one, other in zip(dense, linked, strict=True):
        assert other.is_contiguous()
        torch.testing.assert_close(other, one, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_the_dense_gradient_is_that_of_the_weight_alone(kernels):
    class Sum:
        def add_(self, gradient):
            self.sum = gradient.clone()

    slots, *leaves = case(dtype=torch.bfloat16)
    found = Sum()
    *_, expected = both(slots, *leaves, dense_gradient=found)
    assert found.sum.shape == (OUT, IN)
    torch.testing.assert_close(found.sum, expected, rtol=2e-2, atol=2e-2)


def test_no_kernels_where_triton_does_not_run(caplog):
    assert weight_parts.kernels("cpu") is None
    with mock.patch.dict(sys.modules, {"triton": None, NAME: None}):
        assert weight_parts.kernels.__wrapped__("cuda") is None
    assert "takes torch's own operators" in caplog.text
    slots = Slots(torch.zeros(1, dtype=torch.int32), (3, 5))
    assert slots.padded(torch.zeros(1, dtype=torch.bfloat16)) == (3, 5)

"""Triton's product of row links, by its interpreter on the CPU. On a GPU it is tested in test_gpu.py."""

import os
import subprocess
import sys

import pytest
import torch
from packed_cases import CASES, TOLERANCE, weight_of

from hf_chts.layers.row_links import RowLinks

pytest.importorskip("triton")

# Triton decides when it is first imported whether it compiles or interprets: this file runs itself in a process of its
# own, in which nothing has imported it before
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert f"{len(CASES) * len(TOLERANCE) + 1} passed" in run.stdout


@pytest.fixture
def rows():
    from hf_chts.layers import triton_rows

    return triton_rows


def row_links(mask, weight):
    return RowLinks.of(*mask.nonzero(as_tuple=True), weight[mask], tuple(mask.shape))


@interpreted
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_products_are_those_of_the_dense_weight(rows, case, dtype):
    mask, weight = weight_of(case, dtype)
    links = row_links(mask, weight)
    assert links.dense().equal(weight)
    x, bias = torch.randn(2, mask.shape[1]).to(dtype), torch.randn(mask.shape[0]).to(dtype)
    plain, with_bias = rows.products(x, [links, links], [None, bias])
    expected = x.double() @ weight.double().t()
    assert plain.dtype == dtype
    torch.testing.assert_close(plain.double(), expected, **TOLERANCE[dtype])
    torch.testing.assert_close(with_bias.double(), expected + bias.double(), **TOLERANCE[dtype])


@interpreted
def test_more_weights_than_a_launch_takes(rows):
    weights = [torch.randn(size, 6) for size in (3, 1, 5, 2, 4, 7)]
    links = [row_links(torch.ones_like(weight, dtype=torch.bool), weight) for weight in weights]
    x = torch.randn(3, 6)
    for weight, found in zip(weights, rows.products(x, links, [None] * 6), strict=True):
        torch.testing.assert_close(found, x @ weight.t())
    assert [len(found) for found in rows.products(x[:0], links, [None] * 6)] == [0] * 6

"""What a step with the links alone computes and allocates: in proportion to the links and to the tokens."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_chts import SparsityConfig, sparsify

pytest.importorskip("numba")

OUT, IN, TOKENS = 384, 512, 32
DENSE_PRODUCTS = ("mm", "addmm", "bmm", "linear", "matmul", "einsum", "index_copy", "index_put", "scatter")


class Operators(TorchDispatchMode):
    """The operators of torch that run, and the size of the largest result."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.names.append(function.overloadpacket.__name__)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *(leaf.numel() for leaf in made)])
        return result


def step(compute):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT), torch.nn.ReLU(), torch.nn.Linear(OUT, IN))
    config = SparsityConfig(
        "set", sparsity=0.95, storage="links", compute=compute, target_modules=["0", "2"], update_interval=1
    )
    sparse = sparsify(model, config)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(TOKENS, IN)
    model(x).square().mean().backward()  # compiles
    with Operators() as seen:
        model(x).square().mean().backward()
        optimizer.step()
    return seen, sparse


def test_a_step_makes_nothing_of_the_size_of_a_layer():
    seen, sparse = step("sparse")
    links = max(layer.links for layer in sparse.layers.values())
    assert seen.largest <= max(2 * links, TOKENS * max(OUT, IN)) < OUT * IN / 5
    assert not set(seen.names) & set(DENSE_PRODUCTS), set(seen.names)


def test_the_count_sees_a_dense_step():
    seen, _ = step("dense")
    assert seen.largest >= OUT * IN
    assert set(seen.names) & set(DENSE_PRODUCTS)

"""Layers with random links, and what a dense weight in double precision makes of them."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from hf_chts.layers.link_index import LinkIndex


@dataclass
class Case:
    """Links of one layer in slots of a random order, some without a link."""

    positions: torch.Tensor
    shape: tuple[int, int]
    transposed: bool
    index: LinkIndex

    def weight(self, values):
        """The dense weight, (out, in)."""
        rows, columns = self.shape
        flat = values.new_zeros(rows * columns + 1).index_copy(0, self.positions.long(), values)[:-1]
        return flat.view(columns, rows).t() if self.transposed else flat.view(rows, columns)

    def inputs(self, tokens, dtype=torch.float32, bias=True):
        """(x, values, bias), to be differentiated by."""
        generator = torch.Generator().manual_seed(len(self.positions))
        shapes = [(*tokens, self.shape[1]), (len(self.positions),), *([(self.shape[0],)] if bias else [])]
        found = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
        return [*found, *([] if bias else [None])]


def layer(mask, vacant=3, transposed=False):
    rows, columns = mask.shape
    generator = torch.Generator().manual_seed(rows)
    links = (mask.t() if transposed else mask).flatten().nonzero().flatten()
    positions = torch.cat([links, torch.full((vacant,), mask.numel())]).int()
    positions = positions[torch.randperm(len(positions), generator=generator)]
    index = LinkIndex.empty(len(positions), (rows, columns))
    index.refresh(positions, transposed, 1)
    return Case(positions, (rows, columns), transposed, index)


def random_mask(rows, columns, density, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


def dense(case, x, values, bias, grad):
    """The product, and its gradients by x, values and bias, in double precision."""
    leaves = [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in (x, values, bias)]
    result = functional.linear(leaves[0], case.weight(leaves[1]), leaves[2])
    result.backward(grad.double())
    return [result, *(leaf.grad for leaf in leaves if leaf is not None)]


def close(found, expected, dtype=torch.float32):
    """That numbers are equal within the rounding of a sum of them."""
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == other.shape
        scale = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=tolerance * max(scale, 1e-3))

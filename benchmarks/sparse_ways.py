"""Other ways to multiply with sparse weights, for benchmarks: sparselab's layer, torch's CSR products, and none."""

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")


class Csr:
    """The index of a topology, bool (out, in): its links by row, and by column with where each is among the former."""

    def __init__(self, mask: Tensor) -> None:
        rows, columns = mask.nonzero(as_tuple=True)
        self.shape = mask.shape
        self.rows = functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        self.columns = columns.int()
        self.order = torch.argsort(columns * mask.shape[0] + rows)
        self.rows_of_transpose = functional.pad(mask.sum(0).cumsum(0), (1, 0)).int()
        self.columns_of_transpose = rows[self.order].int()

    def matrix(self, values: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(self.rows, self.columns, values, self.shape, check_invariants=False)

    def transpose(self, values: Tensor) -> Tensor:
        shape = (self.shape[1], self.shape[0])
        return torch.sparse_csr_tensor(
            self.rows_of_transpose, self.columns_of_transpose, values[self.order], shape, check_invariants=False
        )


class CsrProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, index: Csr) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.index = index
        return (index.matrix(values) @ x.t()).t()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, values = ctx.saved_tensors
        index: Csr = ctx.index
        of_input = (index.transpose(values) @ gradient.t()).t() if ctx.needs_input_grad[0] else None
        nothing = index.matrix(torch.zeros_like(values))
        of_values = torch.sparse.sampled_addmm(nothing, gradient.t(), x, beta=0.0).values()
        return of_input, of_values, None


class CsrLinear(nn.Module):
    """A linear layer by torch's CSR products, in fp32 whatever autocast says: MKL has no others."""

    def __init__(self, weight: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.index = Csr(mask)
        self.values = nn.Parameter(weight[mask])

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return CsrProduct.apply(x.flatten(0, -2).float(), self.values, self.index).unflatten(0, x.shape[:-1])


class NoProduct(nn.Module):
    """What a layer takes at least: an output of its size, made of its input without any product."""

    def __init__(self, weight: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.features = weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        times = -(-self.features // x.shape[-1])
        return torch.cat([x] * times, dim=-1)[..., : self.features].contiguous()


def sparselab_layer(weight: Tensor, mask: Tensor) -> nn.Module:
    """sparselab's `SparseLinear` with this weight and topology, without room for further links.

    Its products are in fp32 alone, so what autocast made smaller is made larger again.
    """
    import sparselab

    class Layer(sparselab.SparseLinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    layer = Layer(weight.shape[1], weight.shape[0], bias=False, sparsity=0.5, padding_ratio=0.0)
    layer._csr = sparselab.PaddedCSR.from_dense(weight * mask, padding_ratio=0.0)
    layer._values = nn.Parameter(torch.from_numpy(np.asarray(layer._csr.values)))
    return layer


# way → the layer in place of a linear layer without bias with this weight and topology
REPLACEMENTS: dict[str, Callable[[Tensor, Tensor], nn.Module]] = {
    "sparselab": sparselab_layer,
    "csr": CsrLinear,
    "rest": NoProduct,
}


def replace(model: nn.Module, way: str, masks: Mapping[str, Tensor]) -> None:
    """Put a layer of this way into the place of each layer that has a mask."""
    for name, mask in masks.items():
        weight = model.get_submodule(name).get_parameter("weight").detach()
        model.set_submodule(name, REPLACEMENTS[way](weight, mask))

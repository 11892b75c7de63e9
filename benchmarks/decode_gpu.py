"""One token through all projections of a LLaMA-7B on a GPU: dense weights in bfloat16, and packed links.

    python benchmarks/decode_gpu.py [--sparsity 0.9 0.95] [--layers 32]

Query, key and value, and gate and up, take one launch each, as they do in a model. Each way is recorded as a CUDA
graph, so that nothing but the GPU's own time is measured, and the two take turns. Prints JSON lines; needs a GPU.
"""

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from hf_chts.layers.packed_products import products, row_kernel
from hf_chts.layers.row_links import RowLinks

WIDTH, FFN = 4096, 11008
# the rows of the weights that are multiplied with one input, and its width
GROUPS = [([WIDTH] * 3, WIDTH), ([WIDTH], WIDTH), ([FFN] * 2, WIDTH), ([WIDTH], FFN)]


def weight(rows: int, columns: int, density: float) -> tuple[Tensor, RowLinks]:
    """A random weight, dense and packed."""
    mask = torch.rand(rows, columns, device="cuda") < density
    dense = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * mask
    return dense, RowLinks.of(*mask.nonzero(as_tuple=True), dense[mask], (rows, columns))


def recorded(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


@torch.inference_mode()
def measure(sparsity: float, layers: int, repeats: int) -> dict:
    assert row_kernel("cuda") is not None
    torch.manual_seed(0)
    blocks = [
        [([weight(rows, columns, 1 - sparsity) for rows in several], columns) for several, columns in GROUPS]
        for _ in range(layers)
    ]
    x = {size: torch.randn(1, size, device="cuda", dtype=torch.bfloat16) for size in (WIDTH, FFN)}
    worst = 0.0
    for weights, columns in blocks[0]:
        for (dense, _), found in zip(
            weights, products(x[columns], [links for _, links in weights], [None] * len(weights)), strict=True
        ):
            expected = x[columns].double() @ dense.double().t()
            worst = max(worst, float((found.double() - expected).norm() / expected.norm()))

    def by_dense() -> None:
        for block in blocks:
            for weights, columns in block:
                for dense, _ in weights:
                    functional.linear(x[columns], dense)

    def by_links() -> None:
        for block in blocks:
            for weights, columns in block:
                products(x[columns], [links for _, links in weights], [None] * len(weights))

    graphs = {"dense": recorded(by_dense), "packed": recorded(by_links)}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for repeat in range(repeats + 2):
        for name, graph in graphs.items():
            taken = milliseconds(graph)
            if repeat > 1:
                times[name].append(taken)
    every = [both for block in blocks for weights, _ in block for both in weights]
    size = {
        "dense": sum(dense.nbytes for dense, _ in every),
        "packed": sum(tensor.nbytes for _, links in every for tensor in links.tensors),
    }
    median = {name: statistics.median(found) for name, found in times.items()}
    return {
        "benchmark": "decode_gpu",
        "gpu": torch.cuda.get_device_name(),
        "sparsity": sparsity,
        "layers": layers,
        "milliseconds": {name: round(found, 3) for name, found in median.items()},
        "terabytes_per_second": {name: round(size[name] / median[name] / 1e9, 2) for name in size},
        "gigabytes": {name: round(found / 1e9, 2) for name, found in size.items()},
        "dense_over_packed": round(
            statistics.median(a / b for a, b in zip(times["dense"], times["packed"], strict=True)), 2
        ),
        "error": round(worst, 5),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    for sparsity in options.sparsity:
        print(json.dumps(measure(sparsity, options.layers, options.repeats)), flush=True)

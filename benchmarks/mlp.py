"""Steps a second of the paper's MLP, 784-1568-1568-1568-10, dense and sparse, at batch 32 and 99%.

    python benchmarks/mlp.py [--sparsity 0.99] [--batch 32] [--threads 1 2] [--optimizers sgd adamw]

The three hidden layers are sparse, the last one is dense. Inputs are random numbers of Fashion-MNIST's shape. "rest" is
the model without the products of the hidden layers: what bounds any way. The ways take turns in one process; a figure
is the median over the turns. Prints one JSON line for each optimizer and number of threads.
"""

import argparse
import json
import statistics
import time

import torch
from setups import STEPS, STORAGES, compared, machine, parser, turns
from sparse_ways import REPLACEMENTS, replace
from torch import nn
from torch.nn import functional

from hf_chts import SparsityConfig, sparsify

HIDDEN = ["0", "2", "4"]
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.025, momentum=0.9, weight_decay=5e-4, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, fused=True),
}
WAYS = ["dense", *STORAGES, *REPLACEMENTS]


def mlp(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (784, width, width):
        layers += [nn.Linear(inputs, width, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def config(sparsity: float, **fields: str) -> SparsityConfig:
    return SparsityConfig("set", sparsity=sparsity, update_interval=STEPS, target_modules=HIDDEN, **fields)


def measure(optimizer: str, threads: int, sparsity: float, o: argparse.Namespace) -> dict:
    torch.set_num_threads(threads)
    plan = sparsify(mlp(o.width), config(sparsity, storage="links"))
    masks = {name: layer.storage.topology for name, layer in plan.layers.items()}
    inputs, targets = torch.randn(o.batch, 784), torch.randint(0, 10, (o.batch,))
    losses = {}

    def stepper(way: str):
        model, sparse = mlp(o.width), None
        if way in STORAGES:
            sparse = sparsify(model, config(sparsity, **STORAGES[way]), masks=masks)
        elif way in REPLACEMENTS:
            replace(model, way, masks)
        optimize = OPTIMIZERS[optimizer](model.parameters())
        evolver = sparse.evolver(optimize, 1000 * STEPS) if sparse else None

        def run() -> float:
            """Seconds of a step, over a turn."""
            start = time.perf_counter()
            for _ in range(o.steps):
                loss = functional.cross_entropy(model(inputs), targets)
                loss.backward()
                optimize.step()
                if evolver is not None:
                    evolver.step()
                optimize.zero_grad()
            losses.setdefault(way, float(loss.detach()))
            return (time.perf_counter() - start) / o.steps

        return run

    ways = list(dict.fromkeys(["dense", *o.ways, "rest"]))
    runs = {way: stepper(way) for way in ways}
    turns(runs, 1)  # warms up
    seconds = turns(runs, o.repeats)
    same = [loss for way, loss in losses.items() if way not in ("dense", "rest")]
    return {
        "benchmark": "mlp",
        "layers": f"784-{o.width}-{o.width}-{o.width}-10",
        "sparsity": sparsity,
        "links": plan.links(),
        "batch": o.batch,
        "optimizer": optimizer,
        "steps_a_second": {way: round(1 / statistics.median(taken), 1) for way, taken in seconds.items()},
        **compared(seconds),
        "losses_apart": round(max(same) - min(same), 7) if same else 0.0,
        "steps": o.steps,
        "repeats": o.repeats,
        **machine(),
    }


def options() -> argparse.ArgumentParser:
    found = parser(__doc__)
    found.add_argument("--sparsity", nargs="+", type=float, default=[0.99], help="(default: 0.99)")
    found.add_argument("--batch", type=int, default=32, help="(default: 32)")
    found.add_argument("--width", type=int, default=1568, help="of the hidden layers (default: 1568)")
    found.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="(default: 1 2)")
    found.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    found.add_argument("--ways", nargs="+", default=["masked", "links", "sparse"], choices=WAYS)
    found.add_argument("--steps", type=int, default=20, help="steps of a turn (default: 20)")
    found.add_argument("--repeats", type=int, default=7, help="turns of each way (default: 7)")
    return found


if __name__ == "__main__":
    arguments = options().parse_args()
    for name in arguments.optimizers:
        for number in arguments.threads:
            for share in arguments.sparsity:
                print(json.dumps(measure(name, number, share, arguments)), flush=True)

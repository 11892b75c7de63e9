"""What the updates of a method make of a topology by themselves: degrees, ranks and active neurons.

    python benchmarks/degrees.py [--width 256] [--ffn 688] [--layers 4] [--sparsity 0.99] [--steps 3000]

The updates of a run of the language study, one each 100 steps, with random weights before each in place of trained
ones, so that only how links are chosen counts. Prints one JSON line: for each way, of the square layers' masks as they
begin and as they end, the rank (of random values on the links), the Gini coefficient of their neurons' degrees (0: all
alike; inputs and outputs together), and the share of these that have links; and the share of places that ever had
one.
"""

import json
from typing import Any

import torch
from setups import parser
from torch import Tensor

from hf_chts import SparsityConfig, sparsify
from hf_chts.evolution.evolver import Evolver
from hf_chts.sharding.replicated import ReplicatedWeights
from hf_chts.studies.language_model import build_model

# how links are chosen, beside sparsity
WAYS: dict[str, dict[str, Any]] = {
    "SET": {"method": "set"},
    "CHTs, random regrowth": {"method": "chts", "regrowth": "random"},
    "CHTs": {"method": "chts"},
    "CHTs, CH3-L3n": {"method": "chts", "regrowth": "ch3_l3n"},
    "CHTs, relative importance": {"method": "chts", "removal": "relative_importance"},
    "CHTs, Erdos-Renyi": {"method": "chts", "initial_topology": "erdos_renyi"},
    "CHTs, fan-in": {"method": "chts", "pattern": "fan_in"},
}
INTERVAL = 100  # steps between updates


def gini(degrees: Tensor) -> float:
    """Of nonnegative numbers (n,): half their mean difference by pairs, over their mean."""
    ordered, n = degrees.double().sort().values, len(degrees)
    places = torch.arange(1, n + 1, dtype=torch.float64)
    return float((2 * places - n - 1) @ ordered / (n * ordered.sum()))


def figures(masks: dict[str, Tensor]) -> dict[str, float]:
    """Means over the square masks, (outputs, inputs) each."""
    square = [mask for mask in masks.values() if mask.shape[0] == mask.shape[1]]
    sides = [mask.sum(dim) for mask in square for dim in (0, 1)]
    return {
        "rank": sum(int(torch.linalg.matrix_rank(mask * torch.randn(mask.shape))) for mask in square) / len(square),
        "gini": round(sum(map(gini, sides)) / len(sides), 3),
        "active": round(sum(float(side.gt(0).double().mean()) for side in sides) / len(sides), 3),
    }


def measure(way: str, width: int, ffn: int, layers: int, sparsity: float, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = build_model(width, ffn, layers, 4, 128, 0, bf16=False)
    config = SparsityConfig(sparsity=sparsity, update_interval=INTERVAL, **WAYS[way])
    sparse = sparsify(model, config)
    evolver, plan = Evolver(sparse), config.plan(steps)
    evolver.prepare(steps, ReplicatedWeights(torch.optim.AdamW(model.parameters())))
    begin = figures(sparse.masks())
    for step in filter(plan.is_update, range(1, steps + 1)):
        with torch.no_grad():
            for name, mask in sparse.masks().items():
                sparse.layers[name].parameter.copy_(mask * torch.randn(mask.shape))
        last = evolver.update(step)
    return {"begin": begin, "end": figures(sparse.masks()), "itop": round(last["itop"], 4)}


def main() -> None:
    arguments = parser(__doc__)
    for name, default in (("width", 256), ("ffn", 688), ("layers", 4), ("steps", 3000)):
        arguments.add_argument(f"--{name}", type=int, default=default, help=f"of the run (default: {default})")
    arguments.add_argument("--sparsity", type=float, default=0.99, help="share of missing links (default: 0.99)")
    options = vars(arguments.parse_args())
    print(json.dumps({**options, "ways": {way: measure(way, **options) for way in WAYS}}))


if __name__ == "__main__":
    main()

"""Memory per rank and bytes per topology update of a model on DDP, FSDP2 and ZeRO-3, worked out from its config.

    python benchmarks/scaling.py [--model configs/models/llama_7b.json] [--gpus 1 8 64] [--methods chts] [--measure]
    python benchmarks/scaling.py --exponents [--sparsity 0.9] [--tokens 512]

Nothing is trained: shapes come from the model on torch's meta device, the sharing out of layers from the code that does
it. With --measure, the update of one layer of the model's largest shape is timed here. Prints one JSON line per case.

With --exponents, instead: how the time of a step and of a CHTs update grows with the weights of one block of LLaMA-60M,
130M, 350M and 1B, as exponents fitted to the medians of turns.
"""

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from setups import MODELS, STEPS, finish, lone_layer, machine, network, parser, steady
from transformers import AutoConfig, AutoModelForCausalLM

from hf_chts import SparsityConfig, sparsify
from hf_chts.evolution.update import update_cost
from hf_chts.layers.targets import find_targets
from hf_chts.sharding.ranks import share_out
from hf_chts.topology.allocation import links_at

# Bytes a parameter, under the mixed precision that people use there: weight, gradient, master weight, two moments
REPLICATED = {"weights": 4, "gradients": 4, "moments": 8}  # DDP, autocast over fp32 weights
FSDP2 = {"weights": 4, "gradients": 4, "moments": 8}  # fp32 rows, gathered as bf16
ZERO3 = {"weights": 2, "gradients": 2, "master weights": 4, "moments": 8}  # bf16 with an fp32 master
COPIES = 6  # fp32 copies of a layer that its update takes at most, as benchmarks/topology_update.py measures
GIB = 2**30


def plan(name: str, gpus: int, parameters: int, shapes: Mapping[str, tuple[int, int]], config: SparsityConfig) -> dict:
    """The figures of one engine on `gpus` ranks, in GiB.

    Activations, the dense weight of a layer that is made for a product, and the engine's own buffers are not in them.
    """
    sharded, states = {"DDP": (False, REPLICATED), "FSDP2": (True, FSDP2), "ZeRO-3": (True, ZERO3)}[name]
    sizes = {layer: out * into for layer, (out, into) in shapes.items()}
    sparse, largest = sum(sizes.values()), max(sizes.values())
    owner = share_out({layer: update_cost(shape, config) for layer, shape in shapes.items()}, gpus)
    owned = max(sum(size for layer, size in sizes.items() if owner[layer] == rank) for rank in range(gpus))
    share = gpus if sharded else 1
    linked = config.storage == "links"
    slots = sum(links_at(size, min(config.initial_sparsity, config.sparsity)) for size in sizes.values())
    kept = parameters - sparse + slots if linked else parameters
    density = slots / sparse if linked else 1.0  # of what is held of a layer
    memory = {what: kept * size / share for what, size in states.items()}
    # whole on every rank: int32 positions of slots, or bool masks
    memory["positions of links" if linked else "masks"] = slots * 4.0 if linked else sparse * 1.0
    memory["links ever active (ITOP)"] = sparse / 8
    if config.stores_weights:
        memory["stored weights"] = sparse * 4 / share
    if config.ages_links:
        memory["births of links"] = sparse * density * 2 / share
    update = {"the layer in hand": largest * 4 * (COPIES + (1 if sharded else 0)), "new masks": sparse / 8}
    if sharded:
        update["new masks"] = gpus * largest / 8
    if config.needs_gradient:
        update["dense gradients"] = (owned if sharded else sparse) * 4
    gathered = owned * density * 4 * (gpus - 1) / gpus if sharded else 0
    traffic = {"weights gathered": gathered, "new masks": sparse / 8}
    if config.needs_gradient:
        traffic["dense gradients, each micro-batch" if sharded else "dense gradients"] = sparse * 4
    figures = {"memory": memory, "extra in an update": update, "received or sent by a rank in an update": traffic}
    return {
        "engine": name,
        "gpus": gpus,
        "method": config.method,
        "storage": config.storage,
        **{what: {k: round(v / GIB, 2) for k, v in parts.items()} for what, parts in figures.items()},
        "memory in all": round(sum(memory.values()) / GIB, 2),
    }


def measure(shape: tuple[int, int], method: str, repeats: int) -> dict[str, Any]:
    """Seconds of an update of a lone layer on this machine, and its memory."""
    evolver, train = lone_layer(shape, method, 0.9)
    seconds = []
    for _ in range(repeats + 1):
        train()
        start = time.perf_counter()
        evolver.step()
        seconds.append(time.perf_counter() - start)
    return {
        "layer": list(shape),
        "method": method,
        "links": evolver.sparse.links(),
        "threads": torch.get_num_threads(),
        "seconds": round(statistics.median(seconds[1:]), 2),
    }


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log time over log size, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(taken) for taken in seconds]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def update_seconds(model: str, sparsity: float, repeats: int) -> float:
    """Of a CHTs update of all layers, their optimizer state included."""
    made = network(model)
    optimizer = torch.optim.AdamW(made.parameters(), fused=True)
    evolver = sparsify(made, steady("chts", sparsity)).evolver(optimizer, STEPS)
    ids, taken = torch.randint(0, 100, (1, 16)), []
    for _ in range(repeats + 1):
        made(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        finish()
        start = time.perf_counter()
        evolver.step()
        finish()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def growth(models: Sequence[str], ways: Sequence[str], sparsity: float, tokens: str, repeats: int) -> dict[str, Any]:
    """Seconds of a step in each way, and of an update, over the sizes of `models`."""
    import step

    settings = ["--ways", *ways, "--repeats", str(repeats), "--steps", "1", "--device", "cpu"]
    found = [step.measure(model, step.sizes(tokens), sparsity, step.options().parse_args(settings)) for model in models]
    sizes = [one["weights_of_sparse_layers"] for one in found]
    seconds = {way: [one["seconds"][way] for one in found] for way in found[0]["seconds"]}
    seconds["update"] = [round(update_seconds(model, sparsity, repeats), 5) for model in models]
    return {
        "benchmark": "exponents",
        "models": list(models),
        "weights": sizes,
        "sparsity": sparsity,
        "tokens": tokens,
        "seconds": seconds,
        "exponent": {way: round(exponent(sizes, taken), 2) for way, taken in seconds.items()},
        "repeats": repeats,
        **machine(),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default=str(MODELS / "llama_7b.json"), help="config (default: llama_7b.json)")
    arguments.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64], help="numbers of GPUs (default: 1 8 64)")
    arguments.add_argument(
        "--methods", nargs="+", default=["chts", "chtss", "rigl"], help="methods (default: chts chtss rigl)"
    )
    arguments.add_argument(
        "--measure", action="store_true", help="also time an update of the largest layer (default: no)"
    )
    arguments.add_argument("--repeats", type=int, default=3, help="timed updates (default: 3)")
    arguments.add_argument("--exponents", action="store_true", help="time steps and updates of growing blocks instead")
    arguments.add_argument("--blocks", nargs="+", default=[f"llama_{size}/1" for size in ("60m", "130m", "350m", "1b")])
    arguments.add_argument(
        "--ways", nargs="+", default=["masked", "links", "sparse"], help="of the steps (see step.py)"
    )
    arguments.add_argument("--sparsity", type=float, default=0.9, help="of the steps and updates (default: 0.9)")
    arguments.add_argument("--tokens", default="2x256", help="of a step (default: 2x256)")
    options = arguments.parse_args()
    if options.exponents:
        found = growth(options.blocks, options.ways, options.sparsity, options.tokens, options.repeats)
        print(json.dumps(found), flush=True)
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for method in options.methods:
        shapes = {
            name: tuple(layer.weight.shape) for name, layer in find_targets(model, SparsityConfig(method)).items()
        }
        for gpus in options.gpus:
            for engine in ("DDP", "FSDP2", "ZeRO-3") if gpus > 1 else ("DDP",):
                for storage in ("masked", "links"):
                    config = SparsityConfig(method=method, storage=storage)
                    print(json.dumps(plan(engine, gpus, parameters, shapes, config)), flush=True)
        if options.measure:
            largest = max(shapes.values(), key=lambda shape: shape[0] * shape[1])
            print(json.dumps(measure(largest, method, options.repeats)), flush=True)


if __name__ == "__main__":
    main()

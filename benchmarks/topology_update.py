"""How long a topology update takes beside a plain one and beside the model's forward and backward, and its memory.

    python benchmarks/topology_update.py [--methods chts,chtss,set,rigl] [--sizes 60m] [--sparsity 0.9] [--repeats 5]

Prints one JSON line for each method and size: seconds (medians) of the update, of the plain implementation of the same
formulas in `plain_update.py`, and of forward and backward of the LLaMA model of that size on 1,024 tokens, all three in
turns in one process. Then one line for each method with the
exponent of its growth with the number of weights, if there are several sizes, and one for the memory of each kind of
layer. ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 NUMBA_CPU_NAME=haswell before the command make a processor with
AVX-512 play one without. With `--ranks 2`, instead: the update shared out over that many processes beside the whole of
it in one of them, with as many threads for each process, in turns.
"""

import json
import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from unittest import mock

import torch
import torch.distributed as dist
from plain_update import plain_update
from setups import STEPS, finish, lone_layer, network, parser, steady

from hf_chts import sparsify
from hf_chts.evolution.evolver import Evolver
from hf_chts.machine import device_name
from hf_chts.sharding.replicated import ReplicatedWeights
from hf_chts.topology.compiled import loops

# within it a rank is as if it were the only one
one_world = partial(mock.patch.object, dist, "is_initialized", return_value=False)


def over_ranks(rank: int, ranks: int, threads: int, port: int, method: str, sparsity: float, repeats: int) -> None:
    """One rank of the comparison; rank 0 prints it. While it works alone, the others wait."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    alone, shared = (Evolver(sparsify(network("llama_60m"), steady(method, sparsity))) for _ in range(2))
    engines = [ReplicatedWeights(torch.optim.AdamW(c.sparse.model.parameters())) for c in (alone, shared)]
    shared.prepare(STEPS, engines[1])
    seconds: dict[str, list[float]] = {"alone": [], "shared": []}
    with one_world():
        alone.prepare(STEPS, engines[0])
    for repeat in range(repeats + 1):
        dist.barrier()
        if rank == 0:
            with one_world():
                start = time.perf_counter()
                alone.update(repeat + 1)
                seconds["alone"].append(time.perf_counter() - start)
        dist.barrier()
        start = time.perf_counter()
        shared.update(repeat + 1)
        dist.barrier()
        seconds["shared"].append(time.perf_counter() - start)
    if rank == 0:
        one, many = (statistics.median(seconds[key][1:]) for key in ("alone", "shared"))
        print(
            json.dumps(
                {
                    "benchmark": "topology_update_over_ranks",
                    "method": method,
                    "ranks": ranks,
                    "threads_per_rank": threads,
                    "one_rank_seconds": round(one, 3),
                    "ranks_seconds": round(many, 3),
                    "ratio": round(many / one, 3),
                    "repeats": repeats,
                }
            ),
            flush=True,
        )
    dist.destroy_process_group()


def times(model_name: str, method: str, sparsity: float, tokens: int, repeats: int) -> dict:
    """The update of all sparse layers of a model of configs/models, the plain one, and a pass."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = network(model_name).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    evolver = sparsify(model, steady(method, sparsity)).evolver(optimizer, STEPS)
    length = min(256, tokens)
    ids = torch.randint(0, model.config.vocab_size, (tokens // length, length), device=device)

    def seconds(work: Callable[[], object]) -> float:
        finish()
        start = time.perf_counter()
        work()
        finish()
        return time.perf_counter() - start

    taken: dict[str, list[float]] = {"update": [], "plain": [], "pass": []}
    for repeat in range(repeats + 1):
        taken["pass"].append(seconds(lambda: model(input_ids=ids, labels=ids).loss.backward()))
        gradients = {name: layer.parameter.grad for name, layer in evolver.sparse.layers.items()}
        if repeat % 2 or repeat == repeats:  # a plain one takes long
            taken["plain"].append(seconds(partial(plain_update, evolver, method, gradients)))
        optimizer.step()
        optimizer.zero_grad()
        taken["update"].append(seconds(evolver.step))
    update, plain, one_pass = (
        statistics.median(taken[kind][1:] or taken[kind]) for kind in ("update", "plain", "pass")
    )
    return {
        "benchmark": "topology_update",
        "model": model_name,
        "method": method,
        "sparsity": sparsity,
        "layers": len(evolver.sparse.layers),
        "weights": sum(prod(layer.storage.shape) for layer in evolver.sparse.layers.values()),
        "update_seconds": round(update, 4),
        "plain_seconds": round(plain, 4),
        "plain_over_update": round(plain / update, 2),
        "forward_backward_seconds": round(one_pass, 4),
        "tokens": tokens,
        "ratio": round(update / one_pass, 3),
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "compiled_loops": loops(torch.device(device)) is not None,
        "processor": device_name("cuda") if device == "cuda" else processor(),
    }


def growth(cases: Sequence[dict]) -> dict:
    """The exponent of the seconds over the number of weights: a least-squares line through the logarithms."""
    x, y = ([math.log(case[key]) for case in cases] for key in ("weights", "update_seconds"))
    slope, _ = statistics.linear_regression(x, y)
    return {
        "benchmark": "topology_update_growth",
        "method": cases[0]["method"],
        "models": [case["model"] for case in cases],
        "exponent": round(slope, 3),
    }


def processor() -> str:
    """What torch and oneDNN take this processor for, and its name."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    name = f"{device_name('cpu')}, {torch.backends.cpu.get_cpu_capability()}"
    return name + (f", oneDNN up to {limit}" if limit else "")


def peak_copies(out_features: int, in_features: int, method: str, sparsity: float) -> dict:
    """Peak memory that a layer's update allocates, in dense fp32 copies of it.

    Counted from torch's own record of every allocation, so that what the allocator keeps or shares does not blur it.
    """
    evolver, train = lone_layer((out_features, in_features), method, sparsity)
    train()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        evolver.step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return {
        "benchmark": "topology_update_memory",
        "layer": [out_features, in_features],
        "method": method,
        "peak_bytes": peak,
        "dense_fp32_copies": round(peak / (out_features * in_features * 4), 2),
    }


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--methods", default="chts,chtss,set,rigl", help="methods (default: chts,chtss,set,rigl)")
    options.add_argument("--sizes", default="60m", help="of configs/models, as in 60m,130m,1b (default: 60m)")
    options.add_argument("--sparsity", type=float, default=0.9, help="sparsity of the layers (default: 0.9)")
    options.add_argument("--tokens", type=int, default=1024, help="tokens of the forward and backward (default: 1024)")
    options.add_argument("--repeats", type=int, default=5, help="timed repeats after one to warm up (default: 5)")
    options.add_argument("--ranks", type=int, default=1, help="compare this many processes with one (default: 1)")
    options.add_argument("--threads", type=int, default=1, help="threads of each of the ranks (default: 1)")
    arguments = options.parse_args()
    methods, sparsity, repeats = arguments.methods.split(","), arguments.sparsity, arguments.repeats
    if arguments.ranks > 1:
        for method in methods:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            settings = (arguments.ranks, arguments.threads, port, method, sparsity, repeats)
            torch.multiprocessing.spawn(over_ranks, settings, nprocs=arguments.ranks)
        raise SystemExit
    for method in methods:
        cases = []
        for size in arguments.sizes.split(","):
            cases.append(times(f"llama_{size}", method, sparsity, arguments.tokens, repeats))
            print(json.dumps(cases[-1]), flush=True)
        if len(cases) > 1:
            print(json.dumps(growth(cases)), flush=True)
        for shape in ((512, 512), (1376, 512), (512, 1376), (4096, 4096)):
            print(json.dumps(peak_copies(*shape, method, sparsity)), flush=True)

"""How long a topology update of all LLaMA-60M layers takes beside that model's forward and backward, and its memory.

    python benchmarks/topology_update.py [--method chtss] [--sparsity 0.9] [--repeats 5]

Prints one JSON line for the time and one for the memory of each kind of layer. Update and forward-backward alternate
in one process; the ratio is that of the medians.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_chts import SparsityConfig, TopologyCallback, sparsify
from hf_chts.training.sharding import ReplicatedWeights

MODEL = Path(__file__).parents[1] / "configs/models/llama_60m.json"
INTERVAL, STEPS = 100, 10_000


def times(method: str, sparsity: float, tokens: int, repeats: int) -> dict:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL), dtype=torch.float32)
    # the steady state: every update replaces links at the final sparsity
    config = SparsityConfig(
        method=method,
        sparsity=sparsity,
        initial_sparsity=sparsity,
        sparsity_schedule="constant",
        update_interval=INTERVAL,
    )
    callback = TopologyCallback(sparsify(model, config))
    optimizer = torch.optim.AdamW(model.parameters())
    callback.prepare(STEPS, ReplicatedWeights(optimizer))
    ids = torch.randint(0, model.config.vocab_size, (tokens // 256, 256))
    updates, passes = [], []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        passes.append(time.perf_counter() - start)
        optimizer.step()  # so that there are moments to zero
        optimizer.zero_grad()
        start = time.perf_counter()
        callback.update((repeat + 1) * INTERVAL)
        updates.append(time.perf_counter() - start)
    update, one_pass = statistics.median(updates[1:]), statistics.median(passes[1:])  # the first of each warms up
    return {
        "benchmark": "topology_update",
        "method": method,
        "sparsity": sparsity,
        "layers": len(callback.sparse.layers),
        "update_seconds": round(update, 4),
        "forward_backward_seconds": round(one_pass, 4),
        "tokens": tokens,
        "ratio": round(update / one_pass, 3),
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }


def peak_copies(out_features: int, in_features: int, method: str, sparsity: float) -> dict:
    """Peak memory that a layer's update allocates, in dense fp32 copies of it.

    Counted from torch's own record of every allocation, so that what the allocator keeps or shares does not blur it.
    """
    config = SparsityConfig(
        method=method,
        sparsity=sparsity,
        initial_sparsity=sparsity,
        sparsity_schedule="constant",
        update_interval=INTERVAL,
        target_modules=["0"],
    )
    model = torch.nn.Sequential(torch.nn.Linear(in_features, out_features, bias=False))
    callback = TopologyCallback(sparsify(model, config))
    optimizer = torch.optim.AdamW(model.parameters())
    callback.prepare(STEPS, ReplicatedWeights(optimizer))
    model(torch.randn(1, in_features)).sum().backward()
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        callback.update(INTERVAL)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="chtss", help="method of the config (default: chtss)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="sparsity of the layers (default: 0.9)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the forward and backward (default: 1024)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats after one to warm up (default: 5)")
    arguments = parser.parse_args()
    print(json.dumps(times(arguments.method, arguments.sparsity, arguments.tokens, arguments.repeats)))
    for shape in ((512, 512), (1376, 512), (512, 1376), (4096, 4096), (11008, 4096)):
        print(json.dumps(peak_copies(*shape, arguments.method, arguments.sparsity)), flush=True)

"""Bytes that ranks hand to collectives in a training step and in a topology update, dense, masked and with links alone.

    torchrun --nproc_per_node 2 benchmarks/traffic.py [--engines ddp fsdp2 zero2] [--sparsity 0.9]

On the CPU with gloo. Every collective of torch.distributed is counted where it is called, by the bytes of the tensors
that this rank hands over; DDP's buckets, which its reducer sends from C++, by a hook. Prints a JSON line for each
engine and storage, on rank 0: `step` of a step without an update, `update` of what an update adds, and, for links,
`expected_step`: the density of the sparse layers' part of the dense model's bytes, and all of the rest.
"""

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/distributed"))
from engines import Fsdp2, Replicated, Zero

from hf_chts import SparsityConfig, sparsify

MODEL = LlamaConfig(
    hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, vocab_size=256
)  # fmt: skip
SENDS = (
    *("all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "_all_gather_base"),
    *("all_gather_single", "reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base", "reduce_scatter_single"),
    "batch_isend_irecv",
)
inside = False  # a collective that calls another one
sent: Counter[str] = Counter()


def count(name: str) -> None:
    inner = getattr(dist, name, None)  # their names differ among versions of torch
    if inner is None:
        return

    def counted(*args: Any, **kwargs: Any) -> Any:
        global inside
        if inside:
            return inner(*args, **kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if name == "batch_isend_irecv":
            sent[name] += sum(one.tensor.nbytes for one in args[0] if one.op is dist.isend)
        if tensors:  # what is handed over comes last, where the place for the result comes first
            sent[name] += tensors[-1].nbytes
        inside = True
        try:
            return inner(*args, **kwargs)
        finally:
            inside = False

    setattr(dist, name, counted)


def run(engine: str, storage: str, sparsity: float, steps: int = 4) -> dict[str, Any]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(MODEL)
    sparse = None
    if storage != "dense":
        sparse = sparsify(model, SparsityConfig("set", sparsity=sparsity, update_interval=3, storage=storage))
    wrapped: Any = {"ddp": Replicated, "fsdp2": Fsdp2}.get(engine)
    wrapped = Zero(model, False, 1, stage=int(engine[-1])) if wrapped is None else wrapped(model, False, 1)
    if engine == "ddp":

        def bucket_hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            sent["buckets"] += bucket.buffer().nbytes
            return allreduce_hook(None, bucket)

        wrapped.model.register_comm_hook(None, bucket_hook)
    evolver = sparse.evolver(wrapped.optimizer, max_steps=100) if sparse else None
    each, ids = [], torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(steps):
        sent.clear()
        wrapped.backward(ids, last=True)
        wrapped.step()
        step = sum(sent.values())
        figures = evolver.step() if evolver else {}
        each.append((step, sum(sent.values()) - step, bool(figures)))
    weights = sum(layer.storage.shape[0] * layer.storage.shape[1] for layer in sparse.layers.values()) if sparse else 0
    # the first step has checks and DDP's broadcast in it
    return {
        "step": each[1][0],
        "update": next((extra for _, extra, done in each if done), 0),
        "sparse_weights": weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["ddp", "fsdp2", "zero2"])
    parser.add_argument("--sparsity", type=float, default=0.9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in SENDS:
        count(name)
    everything = sum(parameter.numel() for parameter in LlamaForCausalLM(MODEL).parameters())
    for engine in options.engines:
        found = {storage: run(engine, storage, options.sparsity) for storage in ("dense", "masked", "links")}
        share = found["links"]["sparse_weights"] / everything
        dense = found["dense"]["step"]
        expected = dense * (1 - share) + dense * share * (1 - options.sparsity)
        for storage, figures in found.items():
            line = {"benchmark": "traffic", "engine": engine, "ranks": dist.get_world_size(), "storage": storage}
            line |= {"step": figures["step"], "update": figures["update"], "step_of_dense": figures["step"] / dense}
            if storage == "links":
                line |= {"expected_step": round(expected), "step_of_expected": figures["step"] / expected}
            if dist.get_rank() == 0:
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process that ends with DeepSpeed's groups still there

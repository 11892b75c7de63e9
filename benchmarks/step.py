"""A whole training step (forward, backward, AdamW) in several ways, as ratios to that of the dense model.

    python benchmarks/step.py [--models llama_60m llama_1b/1] [--sparsity 0.9 0.95] [--tokens 4x256] [--bf16]

The ways: dense, masked, links (storage links, dense products), sparse and auto (compute: sparse, auto), sparselab (PyPI
package, its `SparseLinear`), csr (torch's CSR products). Whole models also have "head", the model without its blocks,
and all have "rest", the model without the products of the layers that the others have sparse: no way to multiply with
links can be faster than that, so 1/rest_share (`bound`) bounds every speed-up, 1/head_share that with any blocks.

All ways begin with the same weights and links, and take turns in one process; `speedup` is how many times as fast as
the dense step each is, the median over the turns, `speedups` the extremes. Prints one JSON line for each model, number
of tokens and sparsity. "llama_1b/1" is one block of that model with a vocabulary of 128 tokens.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Mapping

import torch
from setups import STEPS, STORAGES, compared, finish, machine, network, parser, ratios, turns
from sparse_ways import REPLACEMENTS, replace
from torch import Tensor

from hf_chts import SparsityConfig, sparsify

WAYS = ["dense", *STORAGES, "sparselab", "csr", "head", "rest"]


def sparsity_config(sparsity: float, **fields: str) -> SparsityConfig:
    """Never updated; where the links are matters to no product, and the random topology is the quickest to make."""
    return SparsityConfig("set", sparsity=sparsity, update_interval=STEPS, **fields)


class Run:
    """A model that is trained in one way."""

    def __init__(
        self, way: str, model: str, sparsity: float, masks: Mapping[str, Tensor], o: argparse.Namespace
    ) -> None:
        self.device, self.bf16, self.evolver = o.device, o.bf16, None
        network_ = network(model, **({"num_hidden_layers": 0} if way == "head" else {}))
        network_.to(self.device)
        sparse = None
        if way in STORAGES:
            sparse = sparsify(network_, sparsity_config(sparsity, **STORAGES[way]), masks=masks)
        elif way in REPLACEMENTS:
            replace(network_, way, masks)
        self.optimizer = torch.optim.AdamW(network_.parameters(), fused=True)  # as the Trainer's default
        if sparse is not None:
            self.evolver = sparse.evolver(self.optimizer, 10 * STEPS)
        self.model = torch.compile(network_) if o.compile else network_

    def step(self, ids: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        if self.evolver is not None:
            self.evolver.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def seconds(self, ids: Tensor, steps: int) -> float:
        """Of a step, the median of so many."""
        found = []
        for _ in range(steps):
            finish()
            start = time.perf_counter()
            self.step(ids)
            finish()
            found.append(time.perf_counter() - start)
        return statistics.median(found)


def measure(model: str, batch: tuple[int, int], sparsity: float, o: argparse.Namespace) -> dict:
    ways = list(dict.fromkeys(["dense", *o.ways, *(["rest"] if "/" in model else ["head", "rest"])]))
    if "sparselab" in ways and importlib.util.find_spec("sparselab") is None:
        ways.remove("sparselab")  # pip install hf_chts[bench]; there is none for Python 3.10
    plan = sparsify(network(model).to(o.device), sparsity_config(sparsity, storage="links"))
    masks = {name: layer.storage.topology for name, layer in plan.layers.items()}
    links, weights = plan.links(), sum(mask.numel() for mask in masks.values())
    del plan
    ids = torch.randint(0, network(model, num_hidden_layers=0).config.vocab_size, batch, device=o.device)
    gpu, peaks, losses = o.device == "cuda", {}, {}
    runs: dict[str, Run] = {}

    def turn(way: str) -> float:
        run = runs.get(way) or Run(way, model, sparsity, masks, o)
        if way not in runs:
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            losses.setdefault(way, float(run.step(ids)))  # warms up, as the first turn does
        if not o.apart:
            runs[way] = run
        taken = run.seconds(ids, o.steps)
        if gpu and o.apart:
            peaks[f"{way}_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return taken

    for way in ways:  # makes the models
        turn(way)
    seconds = turns({way: lambda way=way: turn(way) for way in ways}, o.repeats)
    same = [loss for way, loss in losses.items() if way not in ("dense", "head", "rest")]
    head = seconds.pop("head", None)
    found = compared(seconds)
    return {
        "benchmark": "step",
        "model": model,
        "sparsity": sparsity,
        "links": links,
        "weights_of_sparse_layers": weights,
        "batch": f"{batch[0]}x{batch[1]}",
        "tokens": batch[0] * batch[1],
        "dtype": "bf16 autocast" if o.bf16 else "fp32",
        "compiled": o.compile,
        "seconds": {way: round(statistics.median(taken), 5) for way, taken in seconds.items()},
        **found,
        "rest_share": round(1 / found["bound"], 4),
        **({"head_share": round(statistics.median(ratios({**seconds, "head": head})["head"]), 4)} if head else {}),
        "losses_apart": round(max(same) - min(same), 7) if same else 0.0,
        "steps": o.steps,
        "repeats": o.repeats,
        **peaks,
        **machine(o.device),
    }


def sizes(text: str) -> tuple[int, int]:
    """ "8x256" or "2048": sequences and tokens of each, which are 256 at most where only the product is said."""
    if "x" in text:
        sequences, length = (int(number) for number in text.split("x"))
        return sequences, length
    tokens = int(text)
    return max(1, tokens // 256), min(tokens, 256)


def options() -> argparse.ArgumentParser:
    found = parser(__doc__)
    found.add_argument("--models", nargs="+", default=["llama_60m"], help="(default: llama_60m)")
    found.add_argument("--sparsity", nargs="+", type=float, default=[0.9], help="(default: 0.9)")
    found.add_argument(
        "--tokens", nargs="+", type=sizes, default=[(8, 256), (1, 128)],
        help="tokens of a step, as 2048 or as 8x256, sequences × tokens (default: 8x256 1x128)",
    )  # fmt: skip
    found.add_argument("--ways", nargs="+", default=WAYS[:-2], choices=WAYS, help="(default: all)")
    found.add_argument("--repeats", type=int, default=5, help="turns of each way (default: 5)")
    found.add_argument("--steps", type=int, default=2, help="steps of a turn, of which the median counts (default: 2)")
    found.add_argument("--bf16", action="store_true", help="autocast to bf16")
    found.add_argument("--compile", action="store_true", help="torch.compile the model")
    found.add_argument(
        "--apart", action="store_true", help="make a way's model for each turn, so that one is there at a time"
    )
    found.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: cuda where there is one)"
    )
    return found


if __name__ == "__main__":
    arguments = options().parse_args()
    for model in arguments.models:
        for batch in arguments.tokens:
            for sparsity in arguments.sparsity:
                print(json.dumps(measure(model, batch, sparsity, arguments)), flush=True)

"""How long a live model evaluates and generates with either storage: links make their dense weights for each product.

    python benchmarks/inference.py [--model llama_60m] [--repeats 7]

In turns in one process: a forward pass of 8×256 tokens, and 24 tokens generated one by one. Prints one JSON line.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch
from setups import network, with_model

from hf_chts import SparsityConfig, sparsify


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.no_grad()
def measure(model: str, repeats: int, batch: tuple[int, int] = (8, 256), new: int = 24) -> dict:
    models = {}
    for storage in ("masked", "links"):
        models[storage] = network(model).eval()
        sparsify(models[storage], SparsityConfig("set", sparsity=0.9, storage=storage))
    vocabulary = models["links"].config.vocab_size
    ids, prompt = torch.randint(0, vocabulary, batch), torch.randint(0, vocabulary, (1, 16))
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    calls = {
        "forward": lambda one: one(input_ids=ids),
        "generate": lambda one: one.generate(prompt, attention_mask=torch.ones_like(prompt), **options),
    }
    found: dict[str, list[float]] = {f"{storage}_{what}": [] for storage in models for what in calls}
    for repeat in range(repeats + 1):
        for storage, one in models.items():
            for what, call in calls.items():
                taken = seconds(lambda call=call, one=one: call(one))
                if repeat:  # the first warms up
                    found[f"{storage}_{what}"].append(taken)
    medians = {f"{name}_seconds": round(statistics.median(times), 3) for name, times in found.items()}
    ratios = {
        f"{what}_ratio": round(medians[f"links_{what}_seconds"] / medians[f"masked_{what}_seconds"], 3)
        for what in calls
    }
    return {"benchmark": "inference", "model": model, **medians, **ratios, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    parser = with_model(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.model, arguments.repeats)), flush=True)

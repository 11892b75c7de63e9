"""Tokens per second of a model that writes one token after the other: dense in float32 and bfloat16, and packed links.

    python benchmarks/decode.py [--model llama_1b] [--layers 24] [--sparsity 0.9] [--tokens 16] [--repeats 5]

The same random weights in all; the models take turns, in one process. Beside the medians: the bytes that a token takes
from memory (all weights but those of embeddings, which it takes one row of), and the tokens per second that they allow
at the bandwidth with which this machine sums up half a gigabyte. Prints one JSON line.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from setups import MODELS, with_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_chts import SparsityConfig, export_sparse, load_sparse, sparsify


def exported(model: str, layers: int | None, sparsity: float, directory: Path) -> Path:
    """A packed export in bfloat16 with random weights."""
    config = AutoConfig.from_pretrained(MODELS / f"{model}.json")
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    sparse = sparsify(network, SparsityConfig("set", sparsity=sparsity, storage="links"))
    sparse.materialize()
    return export_sparse(network, directory, packed=True)


def bytes_of(model: PreTrainedModel) -> tuple[int, int]:
    """All bytes of weights, and those that a token takes from memory."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    total = sum(tensor.nbytes for tensor in tensors.values())
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return total, total - (0 if embeddings is head else embeddings.nbytes)


def bandwidth(mebibytes: int = 512, repeats: int = 5) -> float:
    """Bytes per second."""
    numbers = torch.ones(mebibytes << 18)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - start)
    return numbers.nbytes / statistics.median(times)


@torch.no_grad()
def seconds_per_token(model: PreTrainedModel, tokens: int) -> float:
    ids = torch.arange(8)[None]
    state = model(ids, use_cache=True)
    start = time.perf_counter()
    for _ in range(tokens):
        last = state.logits[:, -1:].argmax(-1)
        state = model(last, past_key_values=state.past_key_values, use_cache=True)
    return (time.perf_counter() - start) / tokens


def measure(model: str, layers: int | None, sparsity: float, tokens: int, repeats: int, mebibytes: int = 512) -> dict:
    with tempfile.TemporaryDirectory() as place:
        directory = exported(model, layers, sparsity, Path(place))
        file = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        models = {
            "packed": load_sparse(directory, compute="sparse"),
            "dense_bf16": AutoModelForCausalLM.from_pretrained(directory),
            "dense_fp32": AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        }
    found: dict[str, list[float]] = {name: [] for name in models}
    bandwidths = []
    for repeat in range(repeats + 1):
        for name, one in models.items():
            taken = seconds_per_token(one.eval(), tokens)
            if repeat:  # the first warms up
                found[name].append(taken)
        bandwidths.append(bandwidth(mebibytes))
    rate = statistics.median(bandwidths)
    figures = {}
    for name, times in found.items():
        total, read = bytes_of(models[name])
        figures[name] = {
            "tokens_per_second": round(1 / statistics.median(times), 2),
            "bound": round(rate / read, 2),
            "bytes_read": read,
            "bytes": total,
        }
    ratios = {
        f"over_{name}": round(statistics.median(a / b for a, b in zip(found[name], found["packed"], strict=True)), 2)
        for name in ("dense_bf16", "dense_fp32")
    }
    return {
        "benchmark": "decode",
        "model": model,
        "layers": models["packed"].config.num_hidden_layers,
        "sparsity": sparsity,
        **figures,
        **ratios,
        "file_bytes": file,
        "memory_over_file": round(figures["packed"]["bytes"] / file, 3),
        "gigabytes_per_second": round(rate / 1e9, 1),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    parser = with_model(__doc__)
    parser.set_defaults(model="llama_1b")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    found = measure(options.model, options.layers, options.sparsity, options.tokens, options.repeats)
    print(json.dumps(found), flush=True)

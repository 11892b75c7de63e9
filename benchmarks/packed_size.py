"""How small a packed export is, and how long it takes to load, beside the plain one.

    python benchmarks/packed_size.py [--sparsities 0.7 0.8 0.9 0.95] [--pattern fan_in] [--repeats 9]

For each sparsity of a LLaMA in bfloat16 it prints one JSON line: the bytes of the packed directory over what the links'
values, one bit for each weight of the sparse layers and the dense parts take; how long loading it takes over the plain
directory (in turns, in one process, medians; the files are in the cache of the system); and whether both give the same
logits, bit for bit. `from_pretrained` only maps a plain file into memory, and the first forward pass reads it: so the
ratio is given without and with a forward pass over 64 tokens, and for `load_sparse`, which needs the values. Under a
pattern the index has fewer bits a weight than one: `index_bits`.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from setups import network, with_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_chts import SparsityConfig, export_sparse, load_sparse, sparsify
from hf_chts.export.packed_files import PackedFiles


def directory_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def index_bits(packed: Path, weights: int) -> float:
    """Bits of the index for each weight of the sparse layers."""
    files = PackedFiles(packed)
    return 8 * sum(files.files.entries[f"{key}_bits"].shape[0] for key in files.weights) / weights


def measure(model: str, sparsity: float, pattern: str, repeats: int, directory: Path) -> dict:
    original = network(model, torch.bfloat16).eval()
    sparse = sparsify(original, SparsityConfig(method="chts", sparsity=sparsity, pattern=pattern))
    plain = export_sparse(original, directory / "plain")
    packed = export_sparse(original, directory / "packed", packed=True)
    weights = sum(mask.numel() for mask in sparse.masks().values())
    dense = sum(parameter.numel() for parameter in original.parameters()) - weights
    formula = 2 * sparse.links() + weights / 8 + 2 * dense
    ids = torch.arange(64).view(1, 64)
    loaders = {"from_pretrained": AutoModelForCausalLM.from_pretrained, "load_sparse": load_sparse}
    kinds = [(name, path) for name in loaders for path in (plain, packed)]
    loading: dict[tuple[str, Path], list[float]] = {kind: [] for kind in kinds}
    running: dict[tuple[str, Path], list[float]] = {kind: [] for kind in kinds}
    equal = True
    with torch.no_grad():
        expected = original(ids).logits
        for repeat in range(repeats + 1):
            for name, path in kinds if repeat % 2 else reversed(kinds):
                start = time.perf_counter()
                loaded = loaders[name](path).eval()
                end = time.perf_counter()
                equal &= bool(loaded(ids).logits.equal(expected))
                if repeat:  # the first is to warm up
                    loading[name, path].append(end - start)
                    running[name, path].append(time.perf_counter() - start)

    def ratio(seconds: dict[tuple[str, Path], list[float]], name: str) -> float:
        return round(statistics.median(seconds[name, packed]) / statistics.median(seconds[name, plain]), 2)

    return {
        "benchmark": "packed_size",
        "model": model,
        "sparsity": sparsity,
        "pattern": pattern,
        "index_bits": round(index_bits(packed, weights), 4),
        "packed_bytes": directory_bytes(packed),
        "over_formula": round(directory_bytes(packed) / formula, 4),
        "over_plain": round(directory_bytes(packed) / directory_bytes(plain), 4),
        "from_pretrained_over_plain": ratio(loading, "from_pretrained"),
        "from_pretrained_and_forward_over_plain": ratio(running, "from_pretrained"),
        "load_sparse_over_plain": ratio(loading, "load_sparse"),
        "seconds": {f"{name} {path.name}": round(statistics.median(loading[name, path]), 3) for name, path in kinds},
        "logits_equal": equal,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    parser = with_model(__doc__)
    parser.add_argument(
        "--sparsities", nargs="+", type=float, default=[0.7, 0.8, 0.9, 0.95], help="(default: 0.7 0.8 0.9 0.95)"
    )
    parser.add_argument("--pattern", default="none", help="fan_in, or N:M with its sparsity (default: none)")
    parser.add_argument("--repeats", type=int, default=9, help="loads of each kind (default: 9)")
    parser.add_argument("--threads", type=int, default=1, help="of torch; loading is one thread's work (default: 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    for sparsity in arguments.sparsities:
        with tempfile.TemporaryDirectory() as directory:
            print(
                json.dumps(measure(arguments.model, sparsity, arguments.pattern, arguments.repeats, Path(directory))),
                flush=True,
            )

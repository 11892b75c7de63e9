"""How much longer a training step between topology updates takes with masks than in the dense Trainer.

    python benchmarks/step_overhead.py [--repeats 9] [--bf16] [--compile]

On a GPU where there is one, else on the CPU (`--cpu` to have it there anyway).

For each batch, sparse and dense steps of one LLaMA alternate in one process (forward, backward, clipping, AdamW, as the
Trainer does them); prints one JSON line with the ratio of the medians.
"""

import argparse
import json
import statistics
import time

import torch
from setups import MODELS, UNEVENTFUL, StopAfter, network, with_model
from torch.utils.data import Dataset
from transformers import AutoConfig, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_chts import SparseTrainer, SparseTrainingArguments, SparsityConfig


class Tokens(Dataset):
    def __init__(self, length: int, vocabulary: int) -> None:
        self.ids = torch.randint(0, vocabulary, (4096, length))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Stopwatch(TrainerCallback):
    """Seconds from the begin to the end of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        finish()
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        finish()
        self.seconds.append(time.perf_counter() - self.start)


def finish() -> None:
    """Wait for what the GPU was given, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(model: str, batch: int, length: int, steps: int, repeats: int, options: argparse.Namespace) -> dict:
    data = Tokens(length, AutoConfig.from_pretrained(MODELS / f"{model}.json").vocab_size)
    # far from the end of the run, so that no update falls into the measurement
    sparsity = SparsityConfig(method="chts", update_interval=10_000)
    settings = {
        "output_dir": "/tmp/hf_chts_step_overhead",
        "per_device_train_batch_size": batch,
        "use_cpu": options.cpu,
        "bf16": options.bf16,
        "torch_compile": options.compile,
        **UNEVENTFUL,
    }
    gpu = torch.cuda.is_available() and not options.cpu
    peaks = {True: 0.0, False: 0.0}  # GiB, by whether the model is sparse

    def run(sparse: bool) -> float:
        watch = Stopwatch()
        with torch.device("cuda" if gpu else "cpu"):
            common = {"model": network(model), "train_dataset": data, "callbacks": [watch, StopAfter(steps)]}
        if sparse:
            trainer = SparseTrainer(args=SparseTrainingArguments(**settings), sparsity=sparsity, **common)
        else:
            trainer = Trainer(args=TrainingArguments(**settings), **common)
        trainer.remove_callback(PrinterCallback)  # standard output is for the JSON lines
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        if gpu:
            peaks[sparse] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return statistics.median(watch.seconds[2:])

    run(True), run(False)  # to warm up
    dense, sparse = [], []
    for repeat in range(repeats):
        # in turns, and the first of each pair in turns too
        for is_sparse in (repeat % 2 == 0, repeat % 2 == 1):
            (sparse if is_sparse else dense).append(run(is_sparse))
    ratios = [s / d for s, d in zip(sparse, dense, strict=True)]
    return {
        "benchmark": "step_overhead",
        "model": model,
        "batch": f"{batch}x{length}",
        "dense_seconds": round(statistics.median(dense), 4),
        "sparse_seconds": round(statistics.median(sparse), 4),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        "steps": steps,
        "repeats": repeats,
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        "bf16": options.bf16,
        "compiled": options.compile,
    } | ({"dense_peak_gib": peaks[False], "sparse_peak_gib": peaks[True]} if gpu else {})


if __name__ == "__main__":
    parser = with_model(__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="pairs of runs for each batch (default: 9)")
    parser.add_argument(
        "--batches", nargs="+", default=["8x256", "1x128"], help="sequences x tokens (default: 8x256 1x128)"
    )
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--cpu", action="store_true", help="on the CPU even where there is a GPU")
    arguments = parser.parse_args()
    for batch in arguments.batches:
        sequences, length = (int(number) for number in batch.split("x"))
        # about as many seconds for a small batch as for a large one
        steps = max(6, min(24, 12_288 // (sequences * length)))
        print(json.dumps(measure(arguments.model, sequences, length, steps, arguments.repeats, arguments)), flush=True)

"""How much longer a training step between topology updates takes than in the dense Trainer, with either storage.

    python benchmarks/step_overhead.py [--repeats 9] [--bf16] [--compile] [--storages masked links]

On a GPU where there is one, else on the CPU (`--cpu` to have it there anyway).

For each batch, sparse and dense steps of one LLaMA alternate in one process (forward, backward, clipping, AdamW, as the
Trainer does them); prints one JSON line with the ratios of the medians to that of the dense Trainer.
"""

import argparse
import json
import statistics

import torch
from setups import MODELS, UNEVENTFUL, StopAfter, Stopwatch, network, with_model
from torch.utils.data import Dataset
from transformers import AutoConfig, PrinterCallback, Trainer, TrainingArguments

from hf_chts import SparseTrainer, SparseTrainingArguments, SparsityConfig


class Tokens(Dataset):
    def __init__(self, length: int, vocabulary: int) -> None:
        self.ids = torch.randint(0, vocabulary, (4096, length))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def measure(model: str, batch: int, length: int, steps: int, repeats: int, options: argparse.Namespace) -> dict:
    data = Tokens(length, AutoConfig.from_pretrained(MODELS / f"{model}.json").vocab_size)
    # far from the end of the run, so that no update falls into the measurement
    config_of = {
        # where the links are matters to no product, and the random topology is the quickest to make
        storage: SparsityConfig("set", update_interval=10_000, storage=storage)
        for storage in options.storages
    }
    settings = {
        "output_dir": "/tmp/hf_chts_step_overhead",
        "per_device_train_batch_size": batch,
        "use_cpu": options.cpu,
        "bf16": options.bf16,
        "torch_compile": options.compile,
        **UNEVENTFUL,
    }
    gpu = torch.cuda.is_available() and not options.cpu
    kinds = ["dense", *options.storages]
    peaks = dict.fromkeys(kinds, 0.0)  # GiB

    def run(kind: str) -> float:
        watch = Stopwatch()
        with torch.device("cuda" if gpu else "cpu"):
            common = {"model": network(model), "train_dataset": data, "callbacks": [watch, StopAfter(steps)]}
        if kind != "dense":
            trainer = SparseTrainer(args=SparseTrainingArguments(**settings), sparsity=config_of[kind], **common)
        else:
            trainer = Trainer(args=TrainingArguments(**settings), **common)
        trainer.remove_callback(PrinterCallback)  # standard output is for the JSON lines
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        if gpu:
            peaks[kind] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return statistics.median(watch.seconds[2:])

    for kind in kinds:  # to warm up
        run(kind)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for repeat in range(repeats):
        # in turns, and the first of each round in turns too
        for kind in kinds[repeat % len(kinds) :] + kinds[: repeat % len(kinds)]:
            seconds[kind].append(run(kind))
    ratios = {kind: [s / d for s, d in zip(seconds[kind], seconds["dense"], strict=True)] for kind in options.storages}
    return {
        "benchmark": "step_overhead",
        "model": model,
        "batch": f"{batch}x{length}",
        **{f"{kind}_seconds": round(statistics.median(one), 4) for kind, one in seconds.items()},
        **{f"{kind}_ratio": round(statistics.median(one), 3) for kind, one in ratios.items()},
        **{f"{kind}_ratios": [round(ratio, 3) for ratio in sorted(one)] for kind, one in ratios.items()},
        "steps": steps,
        "repeats": repeats,
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        "bf16": options.bf16,
        "compiled": options.compile,
    } | ({f"{kind}_peak_gib": peak for kind, peak in peaks.items()} if gpu else {})


if __name__ == "__main__":
    parser = with_model(__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="pairs of runs for each batch (default: 9)")
    parser.add_argument(
        "--batches", nargs="+", default=["8x256", "1x128"], help="sequences x tokens (default: 8x256 1x128)"
    )
    parser.add_argument("--storages", nargs="+", default=["masked", "links"], choices=["masked", "links"])
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--cpu", action="store_true", help="on the CPU even where there is a GPU")
    arguments = parser.parse_args()
    for batch in arguments.batches:
        sequences, length = (int(number) for number in batch.split("x"))
        # about as many seconds for a small batch as for a large one
        steps = max(6, min(24, 12_288 // (sequences * length)))
        print(json.dumps(measure(arguments.model, sequences, length, steps, arguments.repeats, arguments)), flush=True)

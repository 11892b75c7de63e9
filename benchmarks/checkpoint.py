"""Bytes of a checkpoint, and seconds to write it and to resume from it, with either storage.

    python benchmarks/checkpoint.py [--model llama_130m] [--sparsity 0.9] [--repeats 3]

Two steps of the Trainer with a checkpoint after the first, and the second again, resumed: AdamW in fp32. Prints one
JSON line: bytes by file, and medians of the seconds to write a checkpoint, and from `train()` to the first step of the
resumed run (verified, and with the model made already).
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from setups import Stopwatch, network, with_model
from torch.utils.data import Dataset

from hf_chts import SparseTrainer, SparseTrainingArguments, SparsityConfig


class Tokens(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        ids = torch.randint(0, 128, (64,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Timed(SparseTrainer):
    saving = 0.0

    def _save_checkpoint(self, model, trial) -> None:
        start = time.perf_counter()
        super()._save_checkpoint(model, trial)
        self.saving = self.saving or time.perf_counter() - start


def run(model: str, storage: str, sparsity: float, directory: str, resume: bool) -> tuple[float, float]:
    """(seconds to write the checkpoint, seconds before the first step)."""
    watch = Stopwatch()
    settings = {
        "output_dir": directory, "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 1, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no", "overwrite_output_dir": True,
    }  # fmt: skip
    config = SparsityConfig("static", sparsity=sparsity, storage=storage)
    trainer = Timed(
        network(model), SparseTrainingArguments(**settings), sparsity=config, train_dataset=Tokens(), callbacks=[watch]
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=f"{directory}/checkpoint-1" if resume else None)
    return trainer.saving, watch.first - start


def measure(model: str, sparsity: float, repeats: int) -> dict:
    found: dict[str, dict] = {"masked": {}, "links": {}}
    times: dict[str, list[tuple[float, float]]] = {storage: [] for storage in found}
    for _ in range(repeats):
        for storage in found:
            with tempfile.TemporaryDirectory() as directory:
                written, _ = run(model, storage, sparsity, directory, resume=False)
                files = sorted(Path(directory, "checkpoint-1").iterdir())
                found[storage]["bytes"] = {
                    file.name: file.stat().st_size for file in files if file.stat().st_size > 1e5
                }
                _, resumed = run(model, storage, sparsity, directory, resume=True)
                times[storage].append((written, resumed))
    for storage, pairs in times.items():
        for what, seconds in zip(("write_seconds", "resume_seconds"), zip(*pairs, strict=True), strict=True):
            found[storage][what] = round(statistics.median(seconds), 2)
    return {"benchmark": "checkpoint", "model": model, "sparsity": sparsity, **found}


if __name__ == "__main__":
    parser = with_model(__doc__)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.model, arguments.sparsity, arguments.repeats)), flush=True)

"""The memory of training with weights kept dense (storage masked), with one value a link (links), and of a dense model.

    python benchmarks/memory.py [--sparsities 0.9 0.95] [--models llama_130m llama_1b/1 llama_7b/1] [--tokens 256]

Each case runs in a process of its own, one after the other: AdamW in fp32, three optimizer steps of one sequence. A
model with "/n" has n blocks and a vocabulary of 128 tokens, so that hardly anything but sparse layers is left. Prints
one JSON line for each case: the bytes of all live tensors for each weight of the sparse layers (`*_bytes_per_weight`),
counted and not worked out, and the peak of the resident memory, of which `idle_mib` was there before the model was.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_chts import SparseTrainer, SparseTrainingArguments, SparsityConfig, sparsify
from hf_chts.layers.targets import find_targets, matrix_shape

MODELS = Path(__file__).parents[1] / "configs/models"
VOCABULARY = 128  # of a model that is cut


class Tokens(Dataset):
    def __init__(self, length: int, vocabulary: int) -> None:
        self.ids = torch.randint(0, vocabulary, (16, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Counts(TrainerCallback):
    """What is live after an optimizer step, while the gradients are still there."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.bytes: dict[str, int] = {}

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        layers = getattr(self.trainer, "sparse", None)
        found = layers.layers if layers else find_targets(self.trainer.model, SparsityConfig("set"))
        bits = {name: self.trainer.evolver.explored[name].nbytes for name in found} if layers else {}
        kinds = {"parameters": 0, "gradients": 0, "moments": 0, "topology": 0, "bits": sum(bits.values())}
        for layer in found.values():
            parameter = layer.parameter if layers else layer.weight
            kinds["parameters"] += parameter.nbytes
            kinds["gradients"] += parameter.grad.nbytes
            moments = optimizer.state[parameter].values()
            kinds["moments"] += sum(value.nbytes for value in moments if isinstance(value, Tensor) and value.dim())
            kinds["topology"] += sum(buffer.nbytes for buffer in layer.storage.buffers().values()) if layers else 0
        self.bytes = kinds


def peak_mib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)


def run(model: str, kind: str, sparsity: float, length: int) -> dict:
    torch.set_num_threads(2)
    name, _, blocks = model.partition("/")
    config = AutoConfig.from_pretrained(MODELS / f"{name}.json")
    if blocks:
        config.num_hidden_layers, config.vocab_size = int(blocks), VOCABULARY
    idle = peak_mib()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        settings = {
            "output_dir": directory, "max_steps": 3, "per_device_train_batch_size": 1, "save_strategy": "no",
            "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no",
        }  # fmt: skip
        counts = Counts()
        common = {"train_dataset": Tokens(length, config.vocab_size), "callbacks": [counts]}
        if kind == "dense":
            network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            trainer = Trainer(network, TrainingArguments(**settings), **common)
        else:
            sparse_config = SparsityConfig("set", sparsity=sparsity, update_interval=2, storage=kind)
            with torch.device("meta" if kind == "links" else "cpu"):
                network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            sparse = sparsify(network, sparse_config)
            if kind == "links":
                sparse.materialize()
            trainer = SparseTrainer(network, SparseTrainingArguments(**settings), sparsity=sparse, **common)
        counts.trainer = trainer
        trainer.train()
    layers = trainer.sparse.layers if kind != "dense" else find_targets(network, SparsityConfig("set"))
    weights = sum(prod(matrix_shape(layer)) for layer in layers.values())
    each = {f"{what}_bytes_per_weight": round(number / weights, 4) for what, number in counts.bytes.items()}
    return {
        "benchmark": "memory",
        "model": model,
        "storage": kind,
        "sparsity": sparsity if kind != "dense" else 0.0,
        "tokens": length,
        "weights_of_sparse_layers": weights,
        **each,
        "all_bytes_per_weight": round(sum(counts.bytes.values()) / weights, 4),
        "peak_mib": peak_mib(),
        "idle_mib": idle,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama_130m", "llama_1b/1", "llama_7b/1"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.9, 0.95])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument(
        "--one", nargs=3, metavar=("MODEL", "STORAGE", "SPARSITY"), help="a single case, in this process"
    )
    arguments = parser.parse_args()
    if arguments.one:
        one_model, one_kind, one_sparsity = arguments.one
        print(json.dumps(run(one_model, one_kind, float(one_sparsity), arguments.tokens)), flush=True)
        raise SystemExit
    for each_model in arguments.models:
        cases = [("dense", 0.0)] + [(kind, s) for s in arguments.sparsities for kind in ("masked", "links")]
        for each_kind, each_sparsity in cases:
            command = [sys.executable, __file__, "--tokens", str(arguments.tokens), "--one", each_model, each_kind]
            subprocess.run([*command, str(each_sparsity)], check=True)

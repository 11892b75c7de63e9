"""Run by the ranks of `accelerate launch` with FSDP2, with FSDP's efficient loading and without.

accelerate launch --config_file … efficient_loading_worker.py DIRECTORY

It takes the weights of all ranks away, and brings them those of the first: masks must stay. The results must be the
same.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import arguments, case_config
from cpu_engines import allow_fsdp, leave_ranks
from quick import be_quick
from tiny import random_blocks, tiny_llama

from hf_chts import SparseTrainer
from hf_chts.layers.links import check_zeros


def train(directory, efficient):
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(efficient).lower()  # as the launcher does
    args = arguments(directory, max_steps=12, save_strategy="no", max_grad_norm=0.5)
    allow_fsdp()
    run = SparseTrainer(model=tiny_llama(), args=args, sparsity=case_config("chtss"), train_dataset=random_blocks())
    run.train()
    engine = run.evolver.engine
    assert type(engine).__name__ == "Fsdp2Weights"
    check_zeros(run.sparse.layers, engine)
    whole = {name: engine.whole(layer).clone() for name, layer in run.sparse.layers.items()}
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry], run.sparse.masks(), whole


def main(directory):
    (losses, masks, weights), (expected, *others) = (train(f"{directory}/{way}", way) for way in (True, False))
    assert losses == expected
    for found, other in zip((masks, weights), others, strict=True):
        assert found.keys() == other.keys()
        for name, tensor in found.items():
            assert tensor.equal(other[name]), name


if __name__ == "__main__":
    be_quick()
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    leave_ranks()

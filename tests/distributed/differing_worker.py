"""Two ranks that are started with different settings: what each is refused, and whether anything has been written."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import arguments, case_config, trainer
from cpu_engines import leave_ranks
from quick import be_quick
from tiny import random_blocks, tiny_llama

from hf_chts import SparseTrainer
from hf_chts.checkpoint.seal import seal

torch.set_num_threads(1)
SECOND = int(os.environ["RANK"])  # 0 or 1


def run(directory, arguments_of=None, model_of=None, **config):
    """A trainer whose settings on rank 1 are others."""
    args = arguments(directory, **(arguments_of or {}))
    model = tiny_llama(**(model_of or {}))
    return SparseTrainer(model=model, args=args, sparsity=case_config(**config), train_dataset=random_blocks())


# what differs on rank 1, what the refusal names, and its values on both ranks where they are no digests
DIFFERENT = {
    "interval": (lambda d: run(d, update_interval=4 + SECOND), "sparsity's update_interval", "4", "5"),
    "topology seed": (lambda d: run(d, topology_seed=SECOND), "sparsity's topology_seed", "0", "1"),
    "length": (lambda d: run(d, {"max_steps": 24 + SECOND}), "max_steps", "24", "25"),
    "accumulation": (lambda d: run(d, {"gradient_accumulation_steps": 1 + SECOND}), "accumulation_steps", "1", "2"),
    "warm-up": (lambda d: run(d, {"update_warmup_steps": 1 + SECOND}), "update_warmup_steps", "1", "2"),
    "dense": (lambda d: run(d, case=("set", "dense")[SECOND]), "sparsity's method", "'set'", "'dense'"),
    "model": (lambda d: run(d, model_of={"intermediate_size": 60 + 20 * SECOND}), "the model"),
    "masks": (lambda d: with_other_masks(run(d)), "the topology at the begin"),
}  # fmt: skip


def with_other_masks(made):
    if SECOND:
        layer = next(iter(made.sparse.layers.values()))
        layer.topology.copy_(layer.topology.flip(0))
    return made


def refused(made, said, resume=None):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        made.train(resume_from_checkpoint=resume)
    dist.barrier()


def main(directory):
    for what, (make, named, *values) in DIFFERENT.items():
        made = make(f"{directory}/{what}")
        assert made.args.world_size == 2, f"{made.args.world_size} ranks: this test needs two"
        zero, one = values or (r"\w+", r"\w+")
        refused(made, f"{named} is {zero} on rank 0, {one} on rank 1")
        written = {path.name for path in Path(directory, what).glob("*")}
        assert written <= {"training.lock", "run_identity.json"}, written
        dist.barrier()
    # what one rank alone is refused, the other raises too, with what it was
    trainer(f"{directory}/run", save_steps=8, max_steps=16).train()
    said = ("rank 1 of 2 cannot train, so rank 0 does not: there is no checkpoint at", "there is no checkpoint at")
    refused(run(f"{directory}/again"), said[SECOND], f"{directory}/run/checkpoint-{8 + SECOND}")
    refused(run(f"{directory}/run"), "has checkpoints of another run")
    # and those that agree have one identity
    agreed = trainer(f"{directory}/run", model=tiny_llama(seed=5), max_steps=16)
    agreed.train(resume_from_checkpoint=True)
    one_identity(agreed)
    # of a version without identities, and with a seed of each rank's own
    if SECOND == 0:
        for checkpoint in Path(directory, "run").glob("checkpoint-*"):
            history = checkpoint / "topology_history.json"
            history.write_text(json.dumps(json.loads(history.read_text()) | {"run": None}))
            seal(checkpoint, int(checkpoint.name.split("-")[1]))
    dist.barrier()
    for _ in range(2):  # the second goes on with the identity that the first has made
        older = run(f"{directory}/run", {"max_steps": 24, "save_steps": 4, "seed": 42 + SECOND})
        older.train(resume_from_checkpoint=True)
        one_identity(older)


def one_identity(made):
    identities = [None, None]
    dist.all_gather_object(identities, made.identity)
    assert identities[0] == identities[1]


if __name__ == "__main__":
    be_quick()
    main(*sys.argv[1:])
    leave_ranks()

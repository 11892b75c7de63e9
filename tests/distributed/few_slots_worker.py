"""Run by the ranks of torchrun: layers with fewer slots than there are ranks, and numbers that no rank number divides.

    torchrun … few_slots_worker.py DIRECTORY COMPUTE ENGINE…

Writes, from rank 0, the links and the weights of each engine, to compare with one process.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import case_config
from cpu_engines import leave_ranks
from engine_worker import data, model_of, wrap

from hf_chts import sparsify
from hf_chts.sharding.ranks import rank_and_world

STEPS = 9


def train(engine, compute):
    """(slots, masks, weights of the slots) by layer name."""
    model = model_of()
    few = {"k_proj": 0.996, "v_proj": 0.99, "q_proj": 0.8}  # 1, 2 and 210 links
    sparse = sparsify(
        model, case_config("set", update_interval=2, storage="links", compute=compute, layer_sparsity=few)
    )
    run = wrap(engine, model)
    evolver = sparse.evolver(run.optimizer, max_steps=STEPS)
    rank, world_size = rank_and_world()
    for step in range(STEPS):
        mine = data(step)[rank::world_size]
        for i, ids in enumerate(mine):
            run.backward(ids, last=i == len(mine) - 1)
        run.step()
        evolver.step(step + 1)
        evolver.check()
    state = evolver.state_dict()  # collective
    weights = {name: run.whole(layer.parameter).view(-1).clone() for name, layer in sparse.layers.items()}
    return {name: layer.storage.room for name, layer in sparse.layers.items()}, state["slots"], weights


def main(directory, compute, *engines):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for engine in engines:
        found = train(engine, compute)
        if dist.get_rank() == 0:
            torch.save(found, f"{directory}/{engine}.pt")
    leave_ranks()


if __name__ == "__main__":
    main(*sys.argv[1:])

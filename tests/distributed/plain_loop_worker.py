"""Run by the ranks of torchrun: the plain loop on an engine.

    torchrun … plain_loop_worker.py DIRECTORY ENGINE

Writes, from rank 0, masks and losses of each method, to compare among engines and with one process.
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

METHODS = ["rigl", "chtss", "gmp", "mest"]
PER_WEIGHT = "chtss, per-weight Adam steps"
STEPS, INTERVAL = 12, 4


def train(case, method):
    """(masks, sparsities, the optimizer's weights) after twelve steps of six micro-batches over all ranks."""
    model = model_of()
    sparse = sparsify(model, case_config(method, update_interval=INTERVAL))
    run = wrap(case, model)
    optimizer = run.optimizer
    evolver = sparse.evolver(optimizer, max_steps=STEPS)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    losses = []
    for step in range(STEPS):
        mine = data(step)[rank::world_size]
        for i, ids in enumerate(mine):
            run.backward(ids, last=i == len(mine) - 1)
            if i < len(mine) - 1:
                assert evolver.step() == {}  # a micro-batch is no step
        run.step()
        figures = evolver.step()
        assert bool(figures) == evolver.plan.is_update(step + 1), (step, figures)
        assert evolver.finished == step + 1
        evolver.check()
        losses.append(figures.get("sparsity"))
    if dist.is_initialized():
        everyone = [None] * world_size
        dist.all_gather_object(everyone, {name: mask.tolist() for name, mask in sparse.masks().items()})
        assert all(masks == everyone[0] for masks in everyone)
        state = evolver.state_dict()  # collective
        assert state["step"] == STEPS
    weights = {name: run.whole(layer.parameter) for name, layer in sparse.layers.items()}  # collective
    return {name: mask.clone() for name, mask in sparse.masks().items()}, losses, weights


def main(directory, case):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {method: train(case, method) for method in [*METHODS, PER_WEIGHT]}
    if dist.get_rank() == 0:
        torch.save(found, f"{directory}/{case}.pt")
    leave_ranks()


if __name__ == "__main__":
    main(*sys.argv[1:])

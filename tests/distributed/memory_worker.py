"""Run by two ranks of torchrun: the peak memory of a topology update where ranks hold parts of the weights.

torchrun … memory_worker.py DIRECTORY ENGINE…
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from cpu_engines import leave_ranks
from engines import Fsdp2, Zero
from tiny import VOCABULARY, tiny_llama

from hf_chts import SparsityConfig, sparsify
from hf_chts.evolution.evolver import Evolver
from hf_chts.layers.links import check_zeros
from hf_chts.sharding.detect import engine_of


def peak_bytes(work):
    """The most that `work` holds at a time beyond what there was, by torch's record of every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def update_memory(name):
    """(peak of an update, bytes of the largest layer, bytes of all sparse layers), as fp32."""
    model = tiny_llama(hidden_size=96, intermediate_size=200, num_hidden_layers=24)
    sparse = sparsify(model, SparsityConfig(method="chtss", update_interval=4))
    run = Zero(model, False, 1, 3) if name == "zero3" else Fsdp2(model, False, 1)
    engine = engine_of(model, sparse.layers, run.optimizer)
    topology = Evolver(sparse)
    topology.prepare(16, engine)
    run.backward(torch.randint(0, VOCABULARY, (2, 12)), last=True)
    run.step()
    peak = peak_bytes(lambda: topology.update(4))
    check_zeros(sparse.layers, engine)
    sizes = [4 * layer.mask.numel() for layer in sparse.layers.values()]
    return peak, max(sizes), sum(sizes)


def main(directory, *engines):
    dist.init_process_group("gloo")
    found = {name: update_memory(name) for name in engines}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        torch.save(everyone, f"{directory}/memory.pt")
    leave_ranks()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])

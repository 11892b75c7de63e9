"""Run by the ranks of torchrun: a weight that the model also uses past its layer's forward, on each engine named.

    torchrun … elsewhere_worker.py ENGINE…

It is used by rows that the first rank holds where weights are split: it alone can see what they become.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from cpu_engines import leave_ranks
from engine_worker import train, wrap
from tiny import tiny_llama

from hf_chts import SparsityConfig, sparsify
from hf_chts.evolution.first_step import check_first_step
from hf_chts.layers.links import check_zeros
from hf_chts.sharding.detect import engine_of

NAME = "model.layers.1.mlp.up_proj"


def using_rows_elsewhere(model):
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + (x @ mlp.up_proj.weight[:10].t()).mean()
    return model


def after_a_step(case):
    model = using_rows_elsewhere(tiny_llama())
    layers = sparsify(model, SparsityConfig(method="static", sparsity=0.6)).layers
    run = wrap(case, model)
    engine = engine_of(run.module, layers, run.optimizer)
    train(run, 0)
    return engine, layers


torch.set_num_threads(1)
dist.init_process_group("gloo")
for case in sys.argv[1:]:
    engine, layers = after_a_step(case)
    try:
        check_first_step(engine, layers)
        found = None
        check_zeros(layers, engine)
    except RuntimeError as error:
        found = str(error)
    if case.startswith("fsdp2"):
        assert found is not None, "it was not found out"
        assert f"off their masks: {NAME}." in found, found
        assert f"exclude_modules=['{NAME}']" in found, found
    else:
        assert found is None, found
    print("passed", case, flush=True)
leave_ranks()

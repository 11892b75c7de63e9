"""Run by two ranks of `accelerate launch`: trains a tiny model with DDP and checks every rank's layers at every step.

For every case of the table. Writes, from rank 0, the masks of an update that is computed from given weights, to compare
with one process.
"""

import copy
import hashlib
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import CASES, INTERVAL, arguments, case_config, check_links, losses
from cpu_engines import leave_ranks
from quick import be_quick
from tiny import random_blocks, tiny_llama
from transformers import TrainerCallback, set_seed

from hf_chts import SparseTrainer, SparsityHandle, sparsify
from hf_chts.evolution import update_ranks
from hf_chts.evolution.evolver import Evolver
from hf_chts.sharding.replicated import ReplicatedWeights
from hf_chts.topology.bits import pack_bits

STEPS = 12


def digests(masks):
    return [hashlib.sha256(pack_bits(mask).numpy().tobytes()).hexdigest() for mask in masks.values()]


class Checks(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer
        self.updates = 0

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        sparse = self.trainer.sparse
        plan = sparse.config.plan(STEPS)
        for layer in sparse.layers.values():
            moments = optimizer.state[layer.weight]
            if sparse.config.trains_missing:
                assert layer.weight[~layer.mask].eq(0).all()
                continue
            for tensor in (layer.weight, moments["exp_avg"], moments["exp_avg_sq"]):
                assert tensor[~layer.mask].eq(0).all()
        check_links(sparse, plan.sparsity(state.global_step - state.global_step % INTERVAL))
        everyone = [None] * args.world_size
        sums = [layer.weight.detach().sum().item() for layer in sparse.layers.values()]
        dist.all_gather_object(everyone, (digests(sparse.masks()), sums))
        assert all(one == everyone[0] for one in everyone), "ranks hold different masks or weights"
        self.updates += plan.is_update(state.global_step)


def settings(directory, **changes):
    return arguments(
        directory,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=6,
        **changes,
    )


def train_and_resume(case, directory):
    args = settings(directory)
    assert args.world_size == 2, f"{args.world_size} ranks: this test needs two"
    model = tiny_llama()
    set_seed(100 + args.process_index)  # topologies must not come from the global seed
    trainer = SparseTrainer(model=model, args=args, sparsity=case_config(case), train_dataset=random_blocks())
    checks = Checks(trainer)
    trainer.add_callback(checks)
    trainer.train()
    assert checks.updates == (3 if trainer.sparse.config.trains_missing else 2)
    again = SparseTrainer(
        model=tiny_llama(seed=9), args=args, sparsity=case_config(case), train_dataset=random_blocks(), callbacks=[]
    )
    again.train(resume_from_checkpoint=f"{directory}/checkpoint-6")
    assert losses(again) == losses(trainer)
    assert digests(again.sparse.masks()) == digests(trainer.sparse.masks())


def one_update(case):
    """The masks after a single update of untrained weights; in any number of processes."""
    config = case_config(case)
    sparse = sparsify(tiny_llama(seed=3), config)
    topology = Evolver(sparse)
    engine = ReplicatedWeights(torch.optim.AdamW(sparse.model.parameters()))
    topology.prepare(STEPS, engine)
    if config.needs_gradient:
        for name, layer in sparse.layers.items():
            layer.dense_gradient = engine.dense_gradient(layer, topology.owner[name])
            layer.dense_gradient.add_(layer.weight.detach().cos())  # any, as long as it is the same on all ranks
    topology.update(INTERVAL)
    return {name: mask.clone() for name, mask in sparse.masks().items()}


def dense_gradient_is_that_of_an_unmasked_copy(directory):
    """RigL's gradient, over the micro-batches of both ranks, against one backward of each through a dense copy."""
    trainer = SparseTrainer(
        model=tiny_llama(), args=settings(directory, save_strategy="no", max_grad_norm=1e-3),
        sparsity=case_config("rigl"), train_dataset=random_blocks(),
    )  # fmt: skip
    batches, copies, seen = [], [], {}
    inner, make_update = trainer.training_step, update_ranks.TopologyUpdate

    def training_step(model, inputs, *rest):
        if trainer.state.global_step == INTERVAL - 1:
            batches.append(inputs)
            if not copies:
                copies.append(copy.deepcopy(trainer.accelerator.unwrap_model(model)))
        return inner(model, inputs, *rest)

    def topology_update(**parts):
        if parts["step"] == INTERVAL:
            seen.update({name: gradient.clone() for name, gradient in parts["gradients"].items()})
        return make_update(**parts)

    trainer.training_step = training_step
    with mock.patch.object(update_ranks, "TopologyUpdate", topology_update):
        trainer.train()
    dense = copies[0]
    dense.zero_grad()
    SparsityHandle.of(dense).unsparsify()
    assert len(batches) == 2
    for inputs in batches:
        (dense(**inputs).loss / 2).backward()
    for name in trainer.sparse.layers:
        wanted = dense.get_parameter(f"{name}.weight").grad
        dist.all_reduce(wanted)
        if name in seen:  # a rank has those of the layers that it evolves
            torch.testing.assert_close(seen[name], wanted / 2, rtol=1e-4, atol=1e-7)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, list(seen))
    assert {name for names in everyone for name in names} == set(trainer.sparse.layers)


def main(directory):
    masks = {}
    for number, case in enumerate(CASES):
        train_and_resume(case, f"{directory}/{number}")
        masks[case] = one_update(case)
    dense_gradient_is_that_of_an_unmasked_copy(f"{directory}/rigl")
    if dist.get_rank() == 0:
        torch.save(masks, f"{directory}/masks.pt")


if __name__ == "__main__":
    be_quick()
    main(*sys.argv[1:])
    leave_ranks()

"""Run by two ranks of `accelerate launch`: trains a tiny model with DDP and checks every rank's layers at every step.

Writes, from rank 0, the masks of an update that is computed from given weights, to compare with one process.
"""

import hashlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import random_blocks, tiny_llama
from transformers import TrainerCallback, set_seed

from hf_chts import SparseTrainer, SparseTrainingArguments, SparsityConfig
from hf_chts.topology.allocation import links_at
from hf_chts.topology.bits import pack_bits

STEPS = 16


def digests(masks):
    return [hashlib.sha256(pack_bits(mask).numpy().tobytes()).hexdigest() for mask in masks.values()]


class Checks(TrainerCallback):
    updates = 0

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        sparse = self.trainer.sparse
        plan = sparse.config.plan(STEPS)
        for layer in sparse.layers.values():
            moments = optimizer.state[layer.weight]
            for tensor in (layer.weight, moments["exp_avg"], moments["exp_avg_sq"]):
                assert tensor[~layer.mask].eq(0).all()
            step = state.global_step - state.global_step % sparse.config.update_interval
            assert layer.links == links_at(layer.mask.numel(), plan.sparsity(step))
        everyone = [None] * args.world_size
        weights = [layer.weight.detach().sum().item() for layer in sparse.layers.values()]
        dist.all_gather_object(everyone, (digests(sparse.masks()), weights))
        assert all(one == everyone[0] for one in everyone), "ranks hold different masks or weights"
        Checks.updates += plan.is_update(state.global_step)


def main(method, directory):
    args = SparseTrainingArguments(
        output_dir=f"{directory}/run",
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=8,
        disable_tqdm=True,
        use_cpu=True,
        report_to="none",
        update_warmup_steps=2,
        logging_steps=4,
    )
    assert args.world_size == 2, f"{args.world_size} ranks: this test needs two"
    config = SparsityConfig(method=method, update_interval=4)
    model = tiny_llama()
    set_seed(100 + args.process_index)  # topologies must not come from the global seed
    checks = Checks()
    trainer = SparseTrainer(model=model, args=args, sparsity=config, train_dataset=random_blocks())
    checks.trainer = trainer
    trainer.add_callback(checks)
    trainer.train()
    assert Checks.updates == 3
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    again = SparseTrainer(
        model=tiny_llama(seed=9), args=args, sparsity=config, train_dataset=random_blocks(), callbacks=[]
    )
    again.train(resume_from_checkpoint=f"{directory}/run/checkpoint-8")
    assert [entry["loss"] for entry in again.state.log_history if "loss" in entry] == losses
    assert digests(again.sparse.masks()) == digests(trainer.sparse.masks())

    masks = one_update(method)
    if args.process_index == 0:
        torch.save(masks, f"{directory}/masks.pt")


def one_update(method):
    """The masks after a single update of untrained weights; in any number of processes."""
    from hf_chts import TopologyCallback, sparsify
    from hf_chts.training.sharding import ReplicatedWeights

    config = SparsityConfig(method=method, update_interval=4)
    sparse = sparsify(tiny_llama(seed=3), config)
    callback = TopologyCallback(sparse)
    callback.prepare(STEPS)
    if config.needs_gradient:
        for layer in sparse.layers.values():
            layer.dense_gradient = layer.weight.detach().cos()  # any, as long as it is the same on all ranks
    optimizer = torch.optim.AdamW(sparse.model.parameters())
    callback.update(4, ReplicatedWeights(optimizer))
    return {name: mask.clone() for name, mask in sparse.masks().items()}


if __name__ == "__main__":
    main(*sys.argv[1:])

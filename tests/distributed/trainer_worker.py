"""Run by the ranks of `accelerate launch`: SparseTrainer on the launcher's engine, with a topology change on the way.

accelerate launch --config_file … trainer_worker.py DIRECTORY [bf16] [checkpointing] [resume]
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from cpu_engines import allow_fsdp, leave_ranks, use_gloo_alone
from engine_worker import changed
from quick import be_quick
from tiny import random_blocks, tiny_llama
from transformers import TrainerCallback

from hf_chts import SparseTrainer, SparseTrainingArguments, SparsityConfig
from hf_chts.layers.links import check_zeros
from hf_chts.sharding.detect import engine_of

STEPS = 6


class Changes(TrainerCallback):
    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        sparse = self.trainer.sparse
        self.engine = engine_of(sparse.model, sparse.layers, optimizer)
        check_zeros(sparse.layers, self.engine)

    def on_step_end(self, args, state, control, **kwargs):
        layers = self.trainer.sparse.layers
        check_zeros(layers, self.engine)
        if state.global_step in (2, 4):
            for seed, layer in enumerate(layers.values()):
                layer.storage.replace(layer.matrix(changed(layer.mask, seed + state.global_step)), self.engine)
        check_zeros(layers, self.engine)


def main(directory, *options):
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        use_gloo_alone()
    args = SparseTrainingArguments(
        output_dir=f"{directory}/run",
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=4,
        disable_tqdm=True,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        max_grad_norm=0.5,
        bf16="bf16" in options,
        gradient_checkpointing="checkpointing" in options,
    )
    allow_fsdp()
    assert args.world_size == 2, f"{args.world_size} ranks: this test needs two"
    changes = Changes()
    resume = f"{directory}/run/checkpoint-4" if "resume" in options else None
    trainer = SparseTrainer(
        model=tiny_llama(seed=9 if resume else 0),
        args=args,
        sparsity=SparsityConfig(method="static", sparsity=0.7),
        train_dataset=random_blocks(),
        callbacks=[changes],
    )
    changes.trainer = trainer
    trainer.remove_callback(trainer.topology_callback)  # its place is taken by Changes
    trainer.train(resume_from_checkpoint=resume)
    rank = dist.get_rank()
    layers = trainer.sparse.layers
    weights = {}
    for name, layer in layers.items():
        (whole,) = changes.engine.gather([(layer, 0)])
        if rank == 0:
            assert whole[layer.mask].count_nonzero() > 0.9 * layer.links
            weights[name] = whole.clone()
    if rank == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        name = "resumed" if resume else "result"
        torch.save((type(changes.engine).__name__, losses, weights), f"{directory}/{name}.pt")


if __name__ == "__main__":
    be_quick()
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    leave_ranks()

"""Run by the ranks of `accelerate launch`: methods on the launcher's engine, checked after every step, and resumed.

    accelerate launch --config_file … methods_worker.py DIRECTORY ENGINE CASE[ bf16|, frozen][ in slots]…

Writes, from rank 0, what the first update of each case started from and what came of it, to compare with one process.
"""

import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate.state import AcceleratorState
from cases import INTERVAL, arguments, case_config, check_links, losses
from cpu_engines import allow_fsdp, leave_ranks, use_gloo_alone
from ddp_worker import digests
from quick import be_quick
from tiny import random_blocks, tiny_llama
from transformers import TrainerCallback, set_seed

from hf_chts import SparseTrainer, export_sparse
from hf_chts.evolution import update_ranks
from hf_chts.layers.links import check_zeros

STEPS = 12
IN_SLOTS = " in slots"  # the suffix of cases with links storage
# weights whose numbers of elements are divisible by neither 2 nor 3, and some that are
MODEL = {
    "hidden_size": 35, "intermediate_size": 53, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 6,
}  # fmt: skip
# one of which ranks hold unequal parts, and one of a junction
FROZEN = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]


class Checks(TrainerCallback):
    """Everything that must hold on every rank after every step; the masks of all ranks are the same."""

    def __init__(self, trainer, frozen):
        self.trainer = trainer
        self.updates = 0
        self.frozen = {name: trainer.sparse.masks()[name].clone() for name in frozen}

    def on_step_end(self, args, state, control, **kwargs):
        topology, sparse = self.trainer.evolver, self.trainer.sparse
        check_zeros(sparse.layers, topology.engine)
        plan = sparse.config.plan(STEPS)
        if not self.frozen:
            check_links(sparse, plan.sparsity(state.global_step - state.global_step % INTERVAL))
        assert all(sparse.masks()[name].equal(mask) for name, mask in self.frozen.items()), "a frozen layer evolved"
        everyone = [None] * args.world_size
        dist.all_gather_object(everyone, digests(sparse.masks()))
        assert all(one == everyone[0] for one in everyone), "ranks hold different masks"
        self.updates += plan.is_update(state.global_step)


def trainer_of(case, directory, seed, bf16, frozen, storage):
    AcceleratorState._reset_state()  # it remembers the DeepSpeed config of the Trainer before
    args = arguments(
        directory, max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=6,
        max_grad_norm=0.5, bf16=bf16, gradient_checkpointing=bf16,
    )  # fmt: skip
    allow_fsdp()
    model = tiny_llama(seed=seed, **MODEL)
    set_seed(100 + args.process_index)  # topologies must not come from the global seed
    trainer = SparseTrainer(
        model=model, args=args, sparsity=case_config(case, storage=storage), train_dataset=random_blocks()
    )
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    return trainer


def check_that_ranks_agree(topology):
    """One rank alone freezes a layer: no rank evolves it."""
    layers = topology.sparse.layers
    weight = layers["model.layers.1.mlp.down_proj"].parameter
    before = topology.engine.trained(layers)
    assert before == [name for name in layers if name not in FROZEN]
    weight.requires_grad_(dist.get_rank() != 1)
    assert topology.engine.trained(layers) == [name for name in before if name != "model.layers.1.mlp.down_proj"]
    weight.requires_grad_(True)


def train(case, directory, engine):
    case, storage = case.removesuffix(IN_SLOTS), "links" if case.endswith(IN_SLOTS) else "masked"
    name, bf16 = case.removesuffix(" bf16").removesuffix(", frozen"), case.endswith(" bf16")
    frozen = FROZEN if case.endswith(", frozen") else []
    trainer = trainer_of(name, directory, 0, bf16, frozen, storage)
    checks = Checks(trainer, frozen)
    trainer.add_callback(checks)
    first = {}
    inner, make_update = trainer.evolver.update, update_ranks.TopologyUpdate

    def update(step):
        if step != INTERVAL:
            return inner(step)
        topology, layers = trainer.evolver, trainer.sparse.layers
        first["masks"] = {name: mask.clone() for name, mask in trainer.sparse.masks().items()}
        whole = {name: layer.storage.matrix(topology.engine.whole(layer)) for name, layer in layers.items()}
        first["weights"] = {name: layers[name].matrix(weight).float().clone() for name, weight in whole.items()}
        first["gradients"] = {}
        figures = inner(step)
        first["after"] = {name: mask.clone() for name, mask in trainer.sparse.masks().items()}
        return figures

    def topology_update(**parts):
        if parts["step"] == INTERVAL:
            first["gradients"] |= {name: gradient.clone() for name, gradient in parts["gradients"].items()}
        return make_update(**parts)

    trainer.evolver.update = update
    with mock.patch.object(update_ranks, "TopologyUpdate", topology_update):
        trainer.train()
    assert type(trainer.evolver.engine).__name__ == engine
    assert checks.updates == 2
    if frozen:
        check_that_ranks_agree(trainer.evolver)
    weights = trainer.whole_state_dict()
    if dist.get_rank() == 0:
        export_sparse(trainer.accelerator.unwrap_model(trainer.model), f"{directory}/export", state_dict=weights)
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, first.pop("gradients"))
    first["gradients"] = {name: gradient for part in parts for name, gradient in part.items()}

    again = trainer_of(name, directory, 9, bf16, frozen, storage)
    again.train(resume_from_checkpoint=f"{directory}/checkpoint-6")
    assert losses(again) == losses(trainer)
    assert digests(again.sparse.masks()) == digests(trainer.sparse.masks())
    return first


def main(directory, engine, *cases):
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        use_gloo_alone()
    found = {case: train(case, f"{directory}/{number}", engine) for number, case in enumerate(cases)}
    if dist.get_rank() == 0:
        torch.save(found, f"{directory}/updates.pt")


if __name__ == "__main__":
    be_quick()
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    leave_ranks()

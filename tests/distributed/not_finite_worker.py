"""Run by two ranks of `accelerate launch`: rank 1 alone has NaN, or a batch without labels, and both do the same.

accelerate launch --config_file … not_finite_worker.py DIRECTORY SCENARIO…
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import INTERVAL, STEPS, arguments, case_config, losses
from cpu_engines import allow_fsdp, leave_ranks, use_gloo_alone
from quick import be_quick
from tiny import random_blocks, tiny_llama
from transformers import TrainerCallback

from hf_chts import SparseTrainer
from hf_chts.checkpoint.seal import SEAL_NAME

LAYER = "model.layers.1.mlp.up_proj"
SPOILT = 6


class Spoilt(SparseTrainer):
    """Rank 1 has a NaN gradient with a finite loss, or no labels."""

    scenario = ""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        spoilt = self.args.process_index == 1 and self.state.global_step + 1 == SPOILT
        if spoilt and self.scenario == "labels":
            inputs = inputs | {"labels": torch.full_like(inputs["labels"], -100)}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if spoilt and self.scenario == "gradient":
            loss = loss + (outputs["logits"] * 0).sqrt().sum()
            assert loss.isfinite()
        return (loss, outputs) if return_outputs else loss


class Spoils(TrainerCallback):
    """Rank 1 spoils what it holds, before the update and the checkpoint of a step."""

    def on_step_end(self, args, state, control, **kwargs):
        layer = self.trainer.sparse.layers[LAYER]
        gradient = getattr(layer.dense_gradient, "sum", None)
        mine = args.process_index == 1 or self.trainer.evolver.engine.sharded  # which only the owner has, then
        if gradient is not None and mine and self.trainer.scenario == "dense gradient":
            gradient[:] = torch.nan if state.global_step == 2 * INTERVAL else gradient
        if args.process_index != 1:
            return
        if self.trainer.scenario == "weight" and state.global_step == SPOILT:
            self.trainer.evolver.engine.held(layer)["weight"].view(-1)[:] = torch.nan
        if self.trainer.scenario == "moment" and state.global_step == SPOILT:
            self.trainer.evolver.engine.held(layer)["exp_avg"].view(-1)[:] = torch.inf
        if self.trainer.scenario == "update" and state.global_step == 2 * INTERVAL:
            self.trainer.evolver.engine.held(layer)["weight"].view(-1)[:] = torch.nan


def run_of(directory, scenario):
    spoils = Spoils()
    args = arguments(
        directory, per_device_train_batch_size=2, save_steps=3, logging_steps=100, max_grad_norm=0.5,
        average_tokens_across_devices=scenario != "labels",
    )  # fmt: skip
    allow_fsdp()
    assert args.world_size == 2, f"{args.world_size} ranks: this test needs two"
    run = Spoilt(
        model=tiny_llama(), args=args, sparsity=case_config("rigl" if "dense" in scenario else "set"),
        train_dataset=random_blocks(), callbacks=[spoils],
    )  # fmt: skip
    run.scenario, spoils.trainer = scenario, run
    return run


def main(directory, *scenarios):
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        use_gloo_alone()
    for scenario in scenarios:
        place = Path(directory) / scenario
        run = run_of(place, scenario)
        if scenario == "labels":
            run.train()
            assert all(0 < loss < 10 for loss in losses(run))
            assert run.state.global_step == STEPS
            continue
        try:
            run.train()
        except FloatingPointError as error:
            said = str(error)
        else:
            raise AssertionError(f"{scenario}: rank {run.args.process_index} trained to the end")
        evolves = scenario in ("update", "dense gradient")
        assert f"step {2 * INTERVAL if evolves else SPOILT}" in said, said
        assert ("gradient" if scenario == "gradient" else LAYER) in said, said
        sealed = sorted(path.name for path in place.glob("checkpoint-*") if (path / SEAL_NAME).is_file())
        expected = ["checkpoint-3", "checkpoint-6"] if evolves else ["checkpoint-3"]
        assert sealed == expected, (scenario, sealed)
        assert expected[-1] in said, said
        run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    be_quick()
    main(*sys.argv[1:])
    leave_ranks()

"""By how much the loss jumps after topology updates, with and without what is meant to soften it.

    python benchmarks/loss_jump.py [--seeds 3] [--adam_beta2 0.999]

Four variants of one run: neither, the learning-rate warm-up after updates (update_warmup_steps), Adam's bias correction
anew for each regrown link (regrown_adam: per_weight_steps), and both. A small LLaMA trains on the embedded corpus. At
each update the loss on fixed held-out sequences is taken before it, right after it, and after each of the next 30
steps; the jump is the highest of those less the one before. Prints a JSON line per run, and one per variant with the
mean over seeds.
"""

import argparse
import json
import statistics
import tempfile
from typing import Any

import torch
from setups import UNEVENTFUL, parser
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback, set_seed

from hf_chts import SparseTrainer, SparseTrainingArguments, SparsityConfig
from hf_chts.data import DataArguments, load_data

VARIANTS = {
    "neither": {"warmup": False, "regrown_adam": "global_steps"},
    "warm-up": {"warmup": True, "regrown_adam": "global_steps"},
    "per-weight steps": {"warmup": False, "regrown_adam": "per_weight_steps"},
    "both": {"warmup": True, "regrown_adam": "per_weight_steps"},
}
MODEL = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


class Probe(TrainerCallback):
    """The held-out loss around each update."""

    def __init__(self, ids: torch.Tensor, window: int) -> None:
        self.ids, self.window = ids, window
        self.trainer: Any = None
        self.before: list[float] = []
        self.after: list[list[float]] = []

    @torch.no_grad()
    def loss(self) -> float:
        self.trainer.model.eval()
        loss = float(self.trainer.model(input_ids=self.ids, labels=self.ids).loss)
        self.trainer.model.train()
        return loss

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        # the callback that evolves the topology does so in on_step_end, which comes later
        if self.trainer.evolver.plan.is_update(state.global_step + 1):
            self.before.append(self.loss())
            self.after.append([])

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.after and len(self.after[-1]) < self.window + 1:
            self.after[-1].append(self.loss())


def run(variant: str, seed: int, options: argparse.Namespace, data: Any) -> dict[str, Any]:
    settings = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as directory:
        args = SparseTrainingArguments(
            output_dir=directory, per_device_train_batch_size=16, learning_rate=3e-3,
            lr_scheduler_type="cosine", warmup_steps=options.steps // 10, adam_beta2=options.adam_beta2,
            update_warmup_steps=options.warmup_steps if settings["warmup"] else 0, use_cpu=True, seed=seed,
            **UNEVENTFUL | {"max_steps": options.steps},
        )  # fmt: skip
        set_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**MODEL))
        sparsity = SparsityConfig(
            method=options.method, update_interval=options.interval, drop_fraction=options.drop_fraction,
            topology_seed=seed, regrown_adam=settings["regrown_adam"],
        )  # fmt: skip
        trainer = SparseTrainer(model=model, args=args, sparsity=sparsity, train_dataset=data.train)
        trainer.remove_callback(PrinterCallback)
        held_out = torch.tensor([list(data.validation[i]["input_ids"]) for i in range(64)])
        probe = Probe(held_out, 30)
        probe.trainer = trainer
        trainer.add_callback(probe)
        trainer.train()
        jumps = [max(after) - before for before, after in zip(probe.before, probe.after, strict=True)]
        logged = [entry for entry in trainer.state.log_history if "loss_after_update" in entry]
        return {
            "variant": variant,
            "seed": seed,
            "mean_jump": statistics.mean(jumps),
            "largest_jump": max(jumps),
            "mean_jump_at_the_update": statistics.mean(
                after[0] - before for before, after in zip(probe.before, probe.after, strict=True)
            ),
            "mean_training_loss_jump": statistics.mean(
                entry["loss_after_update"] - entry["loss_before_update"] for entry in logged
            ),
            "final_loss": probe.loss(),
        }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: 3)")
    arguments.add_argument("--steps", type=int, default=1500, help="optimizer steps of a run (default: 1500)")
    arguments.add_argument("--interval", type=int, default=100, help="optimizer steps between updates (default: 100)")
    arguments.add_argument(
        "--warmup_steps", type=int, default=20, help="steps of the warm-up after an update (default: 20)"
    )
    arguments.add_argument(
        "--drop_fraction", type=float, default=0.3, help="share of the links replaced (default: 0.3)"
    )
    arguments.add_argument("--adam_beta2", type=float, default=0.999, help="of AdamW (default: 0.999)")
    arguments.add_argument("--method", default="chts", help="sparse training method (default: chts)")
    arguments.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="(default: all)"
    )
    options = arguments.parse_args()
    data = load_data(DataArguments(block_size=64, max_eval_tokens=16384), vocab_size=MODEL["vocab_size"], seed=0)
    runs = []
    for seed in range(options.seeds):
        for variant in options.variants:
            runs.append(run(variant, seed, options, data))
            print(json.dumps(runs[-1]), flush=True)
    for variant in options.variants:
        mine = [r for r in runs if r["variant"] == variant]
        means = {key: statistics.mean(r[key] for r in mine) for key in mine[0] if key not in ("variant", "seed")}
        print(json.dumps({"variant": variant, "seeds": options.seeds, **vars(options) | {"variants": None}, **means}))


if __name__ == "__main__":
    main()

"""Language models: a LLaMA over bytes on the embedded corpus, trained by SparseTrainer in this process."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import default_data_collator

from hf_chts.machine import on_cpu
from hf_chts.studies.figures import TOPOLOGY, TOPOLOGY_CURVES, Figure, best_of
from hf_chts.studies.language_data import Windows, split_tokens
from hf_chts.studies.language_model import block_weights, build_model, narrow_dense
from hf_chts.studies.language_records import OneRanksGradient, Records
from hf_chts.studies.study import Outcome, Run
from hf_chts.studies.tasks import (
    TOO_MANY_THREADS,
    Say,
    check_positive,
    check_range,
    last_checkpoint,
    parsed,
    sparsity_config,
)
from hf_chts.training.arguments import SparseTrainingArguments
from hf_chts.training.trainer import SparseTrainer

PRECISIONS = ("fp32", "bf16_autocast", "bf16_pure")
BASELINES = ("", "same_links", "same_parameters")
FIGURES = {
    "test_bits_last": Figure("test, last step", "bits per byte", better="lower", digits=3),
    "test_bits_best": Figure("test, best step of validation", "bits per byte", better="lower", digits=3),
    "validation_bits_last": Figure("validation, last step", "bits per byte", better="lower", digits=3),
    **TOPOLOGY,
    "average_links": Figure("links of an average step", digits=0),
    "parameters": Figure("all parameters", digits=0),
    "diverged": Figure("diverged", digits=0),
}
CURVES = {"validation_bits": "validation, bits per byte", "train_loss": "training loss, nats", **TOPOLOGY_CURVES}


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        sparsity: fields of SparsityConfig; topology_seed is the run's seed.
        baseline: same_links: the model is dense and so narrow that its blocks have as many weights as those of `width`
            and `ffn` would have links at `sparsity["sparsity"]`; same_parameters: that the whole model has as many
            parameters, with embeddings, head and norms; "": it is as `width` and `ffn` say.
        width, ffn, layers, heads: of the LLaMA.
        context: tokens of a sequence.
        batch: sequences of an optimizer step.
        steps: optimizer steps.
        learning_rate: at its highest; it rises over `warmup` of the run, then falls as a cosine to 0.
        warmup: share of the run.
        update_warmup: optimizer steps over which the rate climbs back after each topology update; -1: the library's
            default.
        weight_decay: of AdamW.
        precision: fp32; bf16_autocast, products in bf16 and weights and moments in fp32; bf16_pure, all of it in bf16.
        one_rank_of: regrowth by gradient gets the gradient of the last n-th of the batch alone, as it does where each
            of n ranks looks at its own before they are summed up; the optimizer gets the whole batch's. 1: so does
            regrowth.
        evaluation_interval: steps between evaluations and between checkpoints.
        evaluation_windows: sequences of the validation and of the test split on which a model is evaluated, spread
            evenly over the split; 0: all.
        threads: of the processor.
    """

    sparsity: dict[str, Any] = field(default_factory=dict)
    baseline: str = ""
    width: int = 256
    ffn: int = 688
    layers: int = 4
    heads: int = 4
    context: int = 128
    batch: int = 8
    steps: int = 3000
    learning_rate: float = 2e-3
    warmup: float = 0.05
    update_warmup: int = -1
    weight_decay: float = 0.0
    precision: str = "fp32"
    one_rank_of: int = 1
    evaluation_interval: int = 500
    evaluation_windows: int = 1024
    threads: int = 1

    def __post_init__(self) -> None:
        check_positive(
            self,
            ("width", "ffn", "layers", "heads", "context", "batch", "steps", "evaluation_interval", "learning_rate"),
        )
        check_range(self, ("threads",), 1, TOO_MANY_THREADS)
        check_range(self, ("context",), 2)  # the first token of a sequence is not predicted
        check_range(self, ("evaluation_windows", "weight_decay"), 0)
        check_range(self, ("warmup",), 0, 1)
        check_range(self, ("update_warmup",), -1)
        for name, known in (("precision", PRECISIONS), ("baseline", BASELINES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(repr, known))}")
        if self.baseline and not (self.sparsity.get("method") == "dense" and self.sparsity.get("sparsity")):
            raise ValueError(
                f"baseline {self.baseline} is a dense model that is as small as a sparse one: set sparsity.method to "
                "dense, and sparsity.sparsity to that of the sparse ones"
            )
        if self.one_rank_of < 1 or self.batch % self.one_rank_of:
            raise ValueError(
                f"one_rank_of is {self.one_rank_of}, and a batch of {self.batch} cannot be shared out among as many"
            )
        if self.steps % self.evaluation_interval:
            raise ValueError(
                f"steps is {self.steps}, not a multiple of evaluation_interval ({self.evaluation_interval}): the last "
                "step is to be evaluated"
            )


def train(run: Run, say: Say) -> Outcome:
    """Train one model, or go on with it from the last checkpoint in the run's folder.

    A loss or weight that becomes NaN or infinite ends the run and not the study: the figures after the last step are
    NaN then, and `diverged` is 1.

    Raises:
        ValueError: the settings do not fit each other.
    """
    settings = parsed(Settings, run.settings)
    torch.set_num_threads(settings.threads)
    width, ffn = _size(settings)
    config = sparsity_config(settings.sparsity, topology_seed=run.seed)
    model = build_model(
        width, ffn, settings.layers, settings.heads, settings.context, run.seed, bf16=settings.precision == "bf16_pure"
    )
    held_out = {
        split: Windows(split_tokens(split), settings.context, settings.evaluation_windows)
        for split in ("validation", "test")
    }
    autocast = settings.precision == "bf16_autocast"
    records = Records(held_out, settings.evaluation_interval, autocast=autocast, say=say)
    output = run.folder / "training"
    trainer = SparseTrainer(
        model=model,
        args=_arguments(settings, str(output), run.seed),
        sparsity=config,
        train_dataset=Windows(split_tokens("train"), settings.context),
        data_collator=default_data_collator,
    )
    trainer.made_of = asdict(settings)
    records.follow(trainer)
    if settings.one_rank_of > 1 and trainer.evolver is not None:
        trainer.add_callback(OneRanksGradient(trainer.evolver))
    diverged = False
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(run, str(output)) is not None)
    except FloatingPointError as error:
        diverged = True
        say(f"diverged: {error}")
    weights = block_weights(width, ffn, settings.layers)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    figures = _figures(records.curves(trainer.state.log_history), diverged)
    figures |= {
        # a dense model has all of its links
        "links": float(trainer.sparse.links() or weights),
        "average_links": records.average_links or float(weights),
        "weights": float(weights),
        "parameters": float(parameters),
        "diverged": float(diverged),
    }
    clock, curves = records.clock, records.curves(trainer.state.log_history)
    return Outcome(figures, curves, clock.seconds, clock.processor_seconds, config.to_dict())


def _size(settings: Settings) -> tuple[int, int]:
    """Width and ffn of the model that is trained."""
    if not settings.baseline:
        return settings.width, settings.ffn
    sparsity = settings.sparsity["sparsity"]
    shape = (settings.width, settings.ffn, settings.layers, settings.heads)
    return narrow_dense(*shape, sparsity, whole=settings.baseline == "same_parameters")


def _arguments(settings: Settings, output: str, seed: int) -> SparseTrainingArguments:
    return SparseTrainingArguments(
        output_dir=output,
        use_cpu=on_cpu(),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch // settings.one_rank_of,
        gradient_accumulation_steps=settings.one_rank_of,
        learning_rate=settings.learning_rate,
        warmup_steps=round(settings.warmup * settings.steps),
        update_warmup_steps=None if settings.update_warmup < 0 else settings.update_warmup,
        weight_decay=settings.weight_decay,
        bf16=settings.precision == "bf16_autocast",
        seed=seed,
        logging_steps=settings.evaluation_interval,
        # a checkpoint has all that was recorded up to it
        save_steps=settings.evaluation_interval,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
    )


def _figures(curves: dict[str, list[float]], diverged: bool) -> dict[str, float]:
    """The figures of the last evaluation and of the best one, chosen on the validation split."""
    validation, test = curves["validation_bits"], curves["test_bits"]
    best = best_of(validation, curves["sparsity"], "lower")
    last = -1 if validation and not diverged else None
    chosen = {"last": last, "best": best}
    figures = {}
    for which, number in chosen.items():
        for split, bits in (("test", test), ("validation", validation)):
            figures[f"{split}_bits_{which}"] = math.nan if number is None else bits[number]
    figures["step_best"] = math.nan if best is None else curves["step"][best]
    for name in ("sparsity", "itop", "active_neurons"):
        figures[name] = curves[name][-1] if curves[name] else math.nan
    return figures

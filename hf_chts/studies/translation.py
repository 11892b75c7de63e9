"""Translation, English to German (arXiv 2501.19107, Table 2): a transformer from scratch on Multi30k.

BLEU is sacrebleu's of detokenized text with its case, `SIGNATURE`. The paper does not say which it has; its code trains
on words, so that its numbers are probably of tokenized text: compare methods with each other rather than with them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sacrebleu.metrics import BLEU
from transformers import AutoModelForSeq2SeqLM, set_seed

from hf_chts.export import load_sparse
from hf_chts.machine import on_cpu
from hf_chts.sparse_model import SparsityHandle
from hf_chts.studies.figures import TOPOLOGY, TOPOLOGY_CURVES, Figure
from hf_chts.studies.sentence_pairs import EncodedPairs, Vocabulary, load_pairs
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
from hf_chts.studies.translation_trainer import (
    KINDS,
    POSITIONS,
    TrainingBatches,
    TranslationArguments,
    TranslationTrainer,
    loss_of,
    new_model,
    translate,
    whole_batch,
)

# and sacrebleu's version
SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp"
FIGURES = {
    "bleu_last": Figure("BLEU", better="higher", papers=True),
    "bleu_best": Figure("BLEU, best step", better="higher"),
    "loss_test_last": Figure("test loss", "nats", better="lower", digits=3),
    "loss_last": Figure("validation loss", "nats", better="lower", digits=3),
    "loss_best": Figure("validation loss, best step", "nats", better="lower", digits=3),
    "step_best": Figure("best step", digits=0),
    **TOPOLOGY,
}
CURVES = {"loss_validation": "validation loss, nats a token", **TOPOLOGY_CURVES}
# of a topology update, as the Trainer logs them
_OF_UPDATES = ("itop", "active_neurons", "sparsity")


@dataclass(frozen=True)
class Settings:
    """The defaults are the paper's Table 2. Glorot's weights, Adam's β2 and no clipping are as its code trains on
    IWSLT, with OpenNMT; byte pairs, norms after each sum (OpenNMT has `norm: pre`) and the learning rate are ours.

    Attributes:
        data: see `load_pairs`.
        vocabulary: most tokens of the byte-pair encoding, of both languages.
        width, feed_forward, layers, heads, dropout, norm, gain: of the model, as in `new_model`.
        tokens: in a batch, of the longer side of its pairs, padding included.
        steps: optimizer steps.
        learning_rate: the highest, at the end of the warm-up.
        warmup: steps of it; from there on the rate falls with the inverse square root of the step.
        update_warmup: steps over which the rate climbs back after a topology update.
        clip: largest norm of the gradient; 0: any.
        evaluate_every: steps between losses on the validation split, which are the checkpoints as well.
        beams, longest: of the search for translations, and their most tokens.
        sentences: how many of the test split are translated; 0: all.
        threads: of the processor.
        sparsity: fields of SparsityConfig; topology_seed is the run's seed.

    Raises:
        ValueError: a number that cannot be, an unknown norm, or steps that are not whole rounds of `evaluate_every`.
    """

    data: str = "bentrevett/multi30k"
    vocabulary: int = 10_000
    width: int = 512
    feed_forward: int = 1024
    layers: int = 6
    heads: int = 8
    dropout: float = 0.1
    norm: str = "post"
    gain: float = 1.0
    label_smoothing: float = 0.1
    tokens: int = 1024
    steps: int = 5000
    learning_rate: float = 5e-4
    warmup: int = 1000
    update_warmup: int = 20
    clip: float = 0.0
    adam_beta2: float = 0.998
    evaluate_every: int = 500
    beams: int = 2
    longest: int = 100
    sentences: int = 0
    threads: int = 1
    sparsity: dict[str, Any] = field(default_factory=lambda: {"method": "dense"})

    def __post_init__(self) -> None:
        if self.norm not in KINDS:
            raise ValueError(f"norm is {self.norm!r}: it must be one of {', '.join(KINDS)}")
        check_positive(
            self,
            ("vocabulary", "width", "feed_forward", "layers", "heads", "gain", "tokens", "learning_rate", "beams"),
        )
        check_range(self, ("threads",), 1, TOO_MANY_THREADS)
        check_range(self, ("dropout", "label_smoothing", "adam_beta2"), 0, 1)
        check_range(self, ("warmup", "update_warmup", "clip", "sentences"), 0)
        check_range(self, ("longest",), 1, POSITIONS)
        if self.width % (2 * self.heads):  # positions need an even width, heads equal parts
            raise ValueError(f"width is {self.width}, and heads {self.heads}: width must be a multiple of 2 × heads")
        if self.evaluate_every < 1 or self.steps < 1 or self.steps % self.evaluate_every:
            raise ValueError(
                f"steps is {self.steps}, and evaluate_every {self.evaluate_every}: steps must be a multiple of it, as "
                "the last step is evaluated too"
            )


def train(run: Run, say: Say) -> Outcome:
    """Train and score one translator; goes on from the last checkpoint in the run's folder, if there is one."""
    settings = parsed(Settings, run.settings)
    torch.set_num_threads(settings.threads)
    splits = load_pairs(settings.data)
    vocabulary = Vocabulary.of(splits["train"], settings.vocabulary, run.folder / "vocabulary.json")
    encoded = {split: EncodedPairs.of(pairs, vocabulary) for split, pairs in splits.items()}
    say(f"{len(splits['train'])} pairs, {len(vocabulary)} tokens in the vocabulary")

    trainer = _trainer(settings, run, encoded, len(vocabulary))
    checkpoint = last_checkpoint(run, trainer.args.output_dir or "")
    trainer.train(resume_from_checkpoint=checkpoint)
    clock, state, device = trainer.clock, trainer.state, trainer.args.device
    last, best = _checkpoint(trainer, state.max_steps), _checkpoint(trainer, state.best_global_step)
    figures: dict[str, float] = {}
    if layers := trainer.sparse.layers:
        figures["links"] = float(sum(layer.links for layer in layers.values()))
    sparsity = trainer.sparse.config.to_dict()
    del trainer  # its moments take as much memory as two models

    references = [german for _, german in splits["test"]][: settings.sentences or None]
    for name, place in {"last": last, "best": best}.items():
        if name == "best" and best == last:
            figures |= {"bleu_best": figures["bleu_last"], "loss_test_best": figures["loss_test_last"]}
            continue
        model = _dense_model(place, device)
        figures[f"loss_test_{name}"] = loss_of(model, encoded["test"], settings.tokens)
        sources = encoded["test"].source[: len(references)]
        found = translate(model, sources, tokens=settings.tokens, beams=settings.beams, longest=settings.longest)
        translations = vocabulary.decode(found)
        figures[f"bleu_{name}"] = bleu(translations, references)
        say(f"{name}: {translations[0]!r} for {references[0]!r}")
    curves = curves_of(state.log_history)
    losses = dict(zip(curves["step"], curves["loss_validation"], strict=True))
    step_best = state.best_global_step or state.max_steps
    figures |= {"loss_last": losses[state.max_steps], "loss_best": losses[step_best], "step_best": float(step_best)}
    figures |= {name: curves[name][-1] for name in ("itop", "active_neurons") if name in curves}
    say(f"BLEU {figures['bleu_last']:.2f}, {SIGNATURE}")
    return Outcome(figures, curves, clock.seconds, clock.processor_seconds, sparsity)


def _trainer(settings: Settings, run: Run, encoded: Mapping[str, EncodedPairs], vocabulary: int) -> TranslationTrainer:
    set_seed(run.seed)
    model = new_model(
        vocabulary,
        width=settings.width,
        feed_forward=settings.feed_forward,
        layers=settings.layers,
        heads=settings.heads,
        dropout=settings.dropout,
        norm=settings.norm,
        gain=settings.gain,
    )
    args = TranslationArguments(
        str(run.folder / "training"),
        max_steps=settings.steps,
        per_device_train_batch_size=1,  # an item of the data is a batch
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="inverse_sqrt",
        warmup_steps=settings.warmup,
        update_warmup_steps=settings.update_warmup,
        label_smoothing_factor=settings.label_smoothing,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=1e-9,
        max_grad_norm=settings.clip,
        eval_strategy="steps",
        eval_steps=settings.evaluate_every,
        save_strategy="steps",
        save_steps=settings.evaluate_every,
        save_total_limit=2,  # the best and the last
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_steps=settings.evaluate_every,
        seed=run.seed,
        use_cpu=on_cpu(),
        disable_tqdm=True,
        report_to="none",
    )
    trainer = TranslationTrainer(
        model=model,
        args=args,
        sparsity=sparsity_config(settings.sparsity, topology_seed=run.seed),
        train_dataset=TrainingBatches(encoded["train"], settings.steps, settings.tokens, run.seed),
        data_collator=whole_batch,
        eval_dataset=encoded["validation"],
        tokens=settings.tokens,
    )
    trainer.made_of = {"settings": dict(run.settings)}  # a checkpoint of other settings is refused
    return trainer


def _checkpoint(trainer: TranslationTrainer, step: int | None) -> Path:
    return Path(trainer.args.output_dir or "") / f"checkpoint-{step or trainer.state.max_steps}"


def _dense_model(checkpoint: Path, device: torch.device) -> Any:
    """The model of a checkpoint with zeros for missing links, which is fastest for a word at a time."""
    model: Any = load_sparse(checkpoint) if (checkpoint / "sparsity_config.json").exists() else None
    if model is None:
        model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
    elif (handle := SparsityHandle.of(model)) is not None:
        handle.unsparsify()
    return model.eval().to(device)


def bleu(translations: Sequence[str], references: Sequence[str]) -> float:
    """Of a corpus, in percent."""
    metric = BLEU()
    score = metric.corpus_score(list(translations), [list(references)]).score
    found = str(metric.get_signature())
    if not found.startswith(SIGNATURE):
        raise ValueError(f"sacrebleu scores as {found}, where {SIGNATURE} is stated: install sacrebleu 2")
    return float(score)


def curves_of(log: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Curves over the steps with an evaluation, from a Trainer's log.

    Returns:
        "step"; "loss_training", the mean since the point before, smoothed labels and dropout included;
        "loss_validation"; of sparse models also the figures of the last topology update, NaN before the first.
    """
    curves: dict[str, list[float]] = {"step": [], "loss_training": [], "loss_validation": []}
    updates: dict[str, float] = {}
    summed, logged, begin = 0.0, 0.0, 0.0
    for entry in log:
        if "loss" in entry:  # the mean since the last entry with one
            summed += entry["loss"] * (entry["step"] - logged)
            logged = entry["step"]
        updates |= {name: entry[name] for name in _OF_UPDATES if name in entry}
        if "eval_loss" in entry:
            curves["step"].append(entry["step"])
            curves["loss_training"].append(summed / max(1, logged - begin))
            curves["loss_validation"].append(entry["eval_loss"])
            for name in _OF_UPDATES:
                curves.setdefault(name, []).append(updates.get(name, math.nan))
            summed, begin = 0.0, logged
    return {name: curve for name, curve in curves.items() if not all(map(math.isnan, curve))}

"""A trainer for any row of the table of architectures."""

from dataclasses import dataclass

from cases import arguments
from tiny_architectures import ARCHITECTURES
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_chts import SparseTrainer, SparseTrainerMixin, SparseTrainingArguments, SparsityConfig

STEPS, INTERVAL, SPARSITY = 12, 2, 0.8


class SparseSeq2SeqTrainer(SparseTrainerMixin, Seq2SeqTrainer):
    pass


@dataclass
class SparseSeq2SeqTrainingArguments(SparseTrainingArguments, Seq2SeqTrainingArguments):
    pass


def trainer(name, directory, method="rigl", model=None, config=None, **changes):
    architecture = ARCHITECTURES[name]
    settings = {"max_steps": STEPS, "save_strategy": "no", "update_warmup_steps": 1, "label_names": ["labels"]}
    seq2seq = architecture.is_encoder_decoder
    kind = SparseSeq2SeqTrainingArguments if seq2seq else SparseTrainingArguments
    return (SparseSeq2SeqTrainer if seq2seq else SparseTrainer)(
        model=model or architecture.model(),
        args=arguments(directory, kind, **(settings | changes)),
        sparsity=SparsityConfig(
            method=method,
            sparsity=SPARSITY,
            update_interval=INTERVAL,
            drop_fraction=0.3,
            target_modules=architecture.target_modules,
            **(config or {}),
        ),
        train_dataset=list(range(64)),
        eval_dataset=list(range(8)),
        data_collator=lambda seeds: architecture.batch(len(seeds), seeds[0]),
    )

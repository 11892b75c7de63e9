"""`prepare`: tokenize a corpus ahead of training."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_chts.commands.from_weights import StartingModel
from hf_chts.commands.options import parse_run
from hf_chts.config import SparsityConfig
from hf_chts.data.arguments import DataArguments
from hf_chts.data.loading import load_corpus
from hf_chts.data.token_preparation import prepare_tokens
from hf_chts.data.tokenizer import load_tokenizer
from hf_chts.model_arguments import ModelArguments, load_config
from hf_chts.training.arguments import SparseTrainingArguments

# A config may set them for training. The tokens do not depend on them.
_FOR_TRAINING = (
    "streaming", "shuffle_buffer", "block_size", "packing", "max_eval_tokens", "attn_implementation", "export_dir",
    "export", "calibration_blocks",
)  # fmt: skip


@dataclass
class PrepareArguments:
    """Parameters that control where tokens are written, and who is held out."""

    _argument_group_name = "preparation"  # HfArgumentParser reads it

    out: str = field(metadata={"help": "Directory to write. If an earlier run was stopped there, it is continued."})
    workers: int | None = field(default=None, metadata={"help": "Worker processes. Default: one per core."})
    seed: int = field(default=42, metadata={"help": "Chooses the held-out documents, as in training."})

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}; it must be at least 1")


def prepare(argv: Sequence[str], program: str) -> None:
    """Tokenize the corpus that `argv` describes, with the fields and config files of training.

    Raises:
        ValueError, OSError: something is wrong with the options, the config or the corpus.
    """
    args, model_args, data_args = parse_run(
        (PrepareArguments, ModelArguments, DataArguments),
        argv,
        program=program,
        description="Tokenize a corpus once, into memory-mapped shards to train on.",
        in_file_too=(SparsityConfig, SparseTrainingArguments),
        only_in_file=_FOR_TRAINING,
    )
    config: Any = load_config(model_args)
    tokenizer = data_args.tokenizer or "embedded"
    if start := StartingModel.of(model_args, SparsityConfig("dense")):
        tokenizer = start.tokenizer(data_args.tokenizer, config.vocab_size)
    index = prepare_tokens(
        load_corpus(data_args, args.seed),
        load_tokenizer(tokenizer, config.vocab_size),
        args.out,
        tokenizer_name=tokenizer,
        on_bad_document=data_args.on_bad_document or "error",
        workers=args.workers,
        progress=lambda line: print(line, flush=True),
    )
    for split, shards in index.splits.items():
        tokens, documents, skipped = (
            sum(getattr(shard, name) for shard in shards) for name in ("tokens", "documents", "skipped")
        )
        left_out = f"; {skipped:,} that could not be read were skipped" if skipped else ""
        print(f"{split}: {tokens:,} tokens of {documents:,} documents{left_out}")
    print(f"prepared  {args.out}  (train on it with --dataset {args.out})")

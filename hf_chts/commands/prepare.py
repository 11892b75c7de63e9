"""`prepare`: tokens made ahead of training."""

import argparse
from dataclasses import dataclass, fields
from typing import Any

from hf_chts.command_help import unit
from hf_chts.command_line import parse_run
from hf_chts.commands.command import Command
from hf_chts.config import SparsityConfig
from hf_chts.config_file import ROOT
from hf_chts.data.arguments import DataArguments
from hf_chts.data.loading import load_corpus
from hf_chts.data.token_preparation import prepare_tokens
from hf_chts.data.tokenizer import load_tokenizer
from hf_chts.model_arguments import ModelArguments, load_config
from hf_chts.training.arguments import SparseTrainingArguments

# what training cuts from the tokens may differ from run to run
_LATER = ("streaming", "shuffle_buffer", "block_size", "packing", "max_eval_tokens")


@dataclass
class _Seed:
    """What of the training's own fields concerns its corpus."""

    seed: int = 42


def _fields(*kinds: Any) -> list[str]:
    return [field.name for kind in kinds for field in fields(kind)]


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of the run: its corpus, tokenizer, model and seed, over which options win (default: none)",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="directory to write, or one that was begun (no default)"
    )
    parser.add_argument("--workers", type=int, metavar="PROCESSES", help="worker processes (default: one per core)")
    parser.add_argument(
        "--model",
        metavar="TEXT",
        help="whose vocabulary has to hold the tokens (default: configs/models/llama_demo.json)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="chooses the held-out documents (default: 42)")
    for field in fields(DataArguments):
        if field.name not in _LATER:
            help = str(field.metadata["help"]).replace("%", "%%")
            parser.add_argument(f"--{field.name}", metavar=unit(field.name, str(field.type)), help=help)


def _prepare(args: argparse.Namespace) -> None:
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers is {args.workers}; it has to be at least 1")
    given = {name: getattr(args, name, None) for name in ("config", *_fields(ModelArguments, DataArguments, _Seed))}
    model_args, data_args, seed = parse_run(
        (ModelArguments, DataArguments, _Seed),
        [f"--{name}={value}" for name, value in given.items() if value is not None],
        default_config=None,
        description=__doc__ or "",
        unused=(SparsityConfig, SparseTrainingArguments),
        program="python -m hf_chts prepare",
    )
    config: Any = load_config(model_args, ROOT)
    tokenizer = load_tokenizer(data_args.tokenizer, config.vocab_size)
    index = prepare_tokens(
        load_corpus(data_args, seed.seed),
        tokenizer,
        args.out,
        tokenizer_name=data_args.tokenizer,
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


PREPARE = Command("tokenize a corpus once, into memory-mapped shards to train on", _arguments, _prepare)

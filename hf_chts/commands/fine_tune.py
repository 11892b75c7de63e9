"""`fine-tune`: supervised fine-tuning of a sparse model through trl's SFTTrainer, and its export."""

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, set_seed
from trl import SFTTrainer

from hf_chts import SparseTrainerMixin, SparsityConfig, SparsityHandle, export_sparse
from hf_chts.commands import one_line_errors, without_fail
from hf_chts.commands.options import parse_run
from hf_chts.commands.train import (
    checkpoint_to_resume,
    fit,
    place,
    quiet_console,
    report_on,
    use_all_cores,
    use_one_device,
)
from hf_chts.config_file import PRESETS_ROOT, find
from hf_chts.export.adapters import Adapters
from hf_chts.fine_tuning.arguments import FineTuningArguments, FineTuningConfig
from hf_chts.fine_tuning.conversations import give_template, load_conversations
from hf_chts.fine_tuning.masked_lora import masked
from hf_chts.fine_tuning.starting_model import load_to_tune
from hf_chts.machine import check_can_write, on_cpu
from hf_chts.plain_text import print_anything
from hf_chts.sharding.ranks import rank_and_world

_ON_CPU = ("--use_cpu", "true", "--bf16", "false")
_ADAPTERS: dict[str, Adapters] = {"masked": "merge_masked", "dense": "merge"}


class SparseSFTTrainer(SparseTrainerMixin, SFTTrainer):  # type: ignore[misc] # both have create_model_card
    """trl's SFTTrainer for sparse models."""


def fine_tune(argv: Sequence[str], program: str) -> None:
    """Fine-tune, measure and export, as the options say.

    Args:
        argv: the command line without the program's name.
        program: its name, for --help and errors.

    Raises:
        SystemExit: with a message of one line for what the user can put right.
    """
    print_anything()
    quiet_console()
    with one_line_errors(program):
        tuning, args = parse_run(
            (FineTuningArguments, FineTuningConfig),
            [*(_ON_CPU if on_cpu() else []), *argv],  # the user's own options come later and win
            program=program,
            description="Fine-tune a sparse model on instructions with trl's SFTTrainer, and export it. On several "
            "devices: accelerate launch -m hf_chts fine-tune …",
        )
        use_one_device(args)
        trainer = build_trainer(tuning, args)
    splits = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # which evaluate once they have trained
    if not checkpoint_to_resume(args) and not splits:
        _say_loss("before", trainer.evaluate())
    fit(cast(Any, trainer), program)
    metrics = trainer.evaluate()
    _say_loss("after", metrics)
    with one_line_errors(program):
        finish(trainer, tuning, metrics)
    if torch.distributed.is_initialized():  # as in train
        torch.distributed.destroy_process_group()


def build_trainer(tuning: FineTuningArguments, args: FineTuningConfig) -> SparseSFTTrainer:
    """The data, the model and the trainer.

    Raises:
        ValueError, OSError: anything that can be refused before training starts.
    """
    output = Path(str(args.output_dir))
    if args.should_save:
        check_can_write(output, "output_dir")
        check_can_write(tuning.export_dir or output, "the directory of the export")
    use_all_cores(cast(Any, args))
    _say(f"Fine-tuning on {place(cast(Any, args))}")
    name = find(tuning.model, PRESETS_ROOT)
    with args.main_process_first(desc="preparing the data"):
        train, validation = load_conversations(
            tuning.dataset, tuning.dataset_split, tuning.validation_split, tuning.validation_fraction, args.seed
        )
    set_seed(args.seed)
    model = load_to_tune(name, fill=tuning.zeros == "fill", attn_implementation=tuning.attn_implementation)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} has no tokenizer that can be loaded: {error}") from error
    if args.chat_template_path is None:
        give_template(tokenizer, train, _say)
    args.assistant_only_loss = args.assistant_only_loss and "messages" in train.column_names
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and args.max_length is not None:
        args.max_length = min(args.max_length, longest)
    sparse = SparsityHandle.of(model)
    if tuning.export == "packed" and (sparse is None or tuning.merge == "dense"):
        raise ValueError("export packed: the result is dense, and has nothing to pack: leave export plain")
    what = "dense" if sparse is None else f"{sparse.sparsity():.2%} sparse, and its links stay"
    _say(f"{len(train):,} conversations to train on, {len(validation):,} to validate on; {name} is {what}")
    trainer = SparseSFTTrainer(
        model=model,
        args=args,
        sparsity=sparse or SparsityConfig(method="dense"),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        peft_config=_lora(tuning, sparse) if tuning.lora_rank else None,
    )
    if tuning.lora_rank and tuning.merge != "none" and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            f"merge is {tuning.merge!r}, and this engine splits the weights over its ranks: train with one process or "
            "DDP, or set merge: none, and merge the saved adapters in one process"
        )
    return trainer


def _lora(tuning: FineTuningArguments, sparse: SparsityHandle | None) -> LoraConfig:
    config = LoraConfig(
        r=tuning.lora_rank,
        lora_alpha=tuning.lora_alpha or 2 * tuning.lora_rank,
        lora_dropout=tuning.lora_dropout,
        target_modules=list(sparse.layers) if sparse is not None else "all-linear",
        task_type="CAUSAL_LM",
    )
    return masked(config) if sparse is not None and tuning.merge == "masked" else config


def finish(trainer: SparseSFTTrainer, tuning: FineTuningArguments, metrics: dict[str, float]) -> None:
    """Export the tuned model, say what merging adapters costs, and report.

    Raises:
        OSError: the directory cannot be written.
    """
    output = Path(str(trainer.args.output_dir))
    adapters = _ADAPTERS.get(tuning.merge, "refuse")
    if tuning.lora_rank and tuning.merge == "none":
        trainer.save_model(str(output / "adapters"))
        _say(f"adapters    {output / 'adapters'}")
        return
    merged = bool(tuning.lora_rank)
    weights = None if merged else trainer.whole_state_dict()
    if not trainer.is_world_process_zero():
        return
    exported = export_sparse(
        trainer.accelerator.unwrap_model(trainer.model),
        tuning.export_dir or output / "export",
        state_dict=weights,
        tokenizer=cast(Any, trainer.processing_class),
        packed=tuning.export == "packed",
        adapters=adapters if merged else "refuse",
        training={
            "fine-tuned from": tuning.model,
            "instructions": tuning.dataset,
            **({"LoRA rank": tuning.lora_rank} if merged else {}),
        },
        metrics={"loss": metrics["eval_loss"]},
    )
    _say(f"export      {exported}")
    if merged and rank_and_world()[1] == 1:
        _say_loss("merged", loss_of_export(exported, trainer))
    report, failed = without_fail("The report", report_on, output)
    _say(f"report      {report}" if report else failed)


def loss_of_export(exported: Path, trainer: SparseSFTTrainer) -> dict[str, float]:
    """The metrics of an export on the trainer's validation data."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(exported)
    args = copy(trainer.args)
    args.disable_tqdm, args.remove_unused_columns = True, False  # the collator takes what it needs
    plain = Trainer(model=model, args=args, data_collator=trainer.data_collator, eval_dataset=trainer.eval_dataset)
    return plain.evaluate()


def _say_loss(when: str, metrics: dict[str, float]) -> None:
    _say(f"{when + ':':<12}loss {metrics['eval_loss']:.4f} on the validation answers")


def _say(line: str) -> None:
    if rank_and_world()[0] == 0:
        print(line, flush=True)

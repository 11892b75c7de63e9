"""`fine-tune`: supervised fine-tuning of a sparse model through trl's SFTTrainer, and its export."""

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback, Trainer, set_seed
from trl import SFTTrainer

from hf_chts import SparseTrainerMixin, SparsityConfig, SparsityHandle, export_sparse
from hf_chts.commands import one_line_errors, without_fail
from hf_chts.commands.options import parse_run
from hf_chts.commands.train import (
    check_folders,
    checkpoint_to_resume,
    digest_of,
    fit,
    place,
    quiet_console,
    report_on,
    use_all_cores,
    use_one_device,
)
from hf_chts.config_file import PRESETS_ROOT, find
from hf_chts.export.activation_code import refuse_plain
from hf_chts.export.adapters import Adapters
from hf_chts.export.starting_weights import weights_digest
from hf_chts.fine_tuning.arguments import FineTuningArguments, FineTuningConfig
from hf_chts.fine_tuning.conversations import check_ends, give_template, load_conversations
from hf_chts.fine_tuning.masked_lora import masked
from hf_chts.fine_tuning.starting_model import also_sparse, load_to_tune
from hf_chts.machine import on_cpu
from hf_chts.names import listed
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
        with one_line_errors(program):
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
    check_folders(args, tuning.export_dir)
    use_all_cores(cast(Any, args))
    _say(f"Fine-tuning on {place(cast(Any, args))}")
    name = find(tuning.model, PRESETS_ROOT)
    exports = not tuning.lora_rank or tuning.merge != "none"
    target = Path(tuning.export_dir or output / "export")
    if exports and Path(name).is_dir() and target.resolve() == Path(name).resolve():
        raise ValueError(
            f"the export would overwrite the model itself, {name}: choose another output_dir or export_dir"
        )
    template = args.chat_template_path
    if template is not None and template.endswith(".jinja") and not Path(template).is_file():
        raise ValueError(f"there is no chat template {template}: name a file, or leave chat_template_path out")
    with args.main_process_first(desc="preparing the data"):
        train, validation = load_conversations(
            tuning.dataset, tuning.dataset_split, tuning.validation_split, tuning.validation_fraction, args.seed
        )
    set_seed(args.seed)
    model = load_to_tune(name, fill=tuning.zeros == "fill", attn_implementation=tuning.attn_implementation)
    tokenizer = _tokenizer(name, model, train, args)
    args.assistant_only_loss = args.assistant_only_loss and "messages" in train.column_names
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and args.max_length is not None:
        args.max_length = min(args.max_length, longest)
    sparse = SparsityHandle.of(model)
    if tuning.export == "packed" and (sparse is None or tuning.merge == "dense"):
        raise ValueError("export packed: the result is dense, and has nothing to pack: leave export plain")
    if tuning.lora_rank and sparse is not None and sparse.config.activation_topk < 1:
        # adapters add to what is left of a layer's outputs, and merged ones to the outputs before
        raise ValueError(
            f"of {name} only the largest activations stay (activation_topk {sparse.config.activation_topk:g}), and "
            "with adapters that is another function before they are merged than after: leave lora_rank out"
        )
    if exports and tuning.export == "plain" and sparse is not None:
        refuse_plain(sparse.config.activation_topk, "--export packed")
    what = "dense" if sparse is None else f"{sparse.sparsity():.2%} sparse, and its links stay"
    if sparse is not None and (others := also_sparse(name)):
        what += f", but not the zeros of its {listed(others)} (also_sparse)"
    _say(f"{len(train):,} conversations to train on, {len(validation):,} to validate on; {name} is {what}")
    begun = weights_digest(model)
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
    left = cast(datasets.Dataset, trainer.train_dataset)
    if not args.packing:  # which cuts conversations, and leaves none out
        _check_lengths(args, "train", train, left)
        _check_lengths(args, "validate", validation, cast(datasets.Dataset, trainer.eval_dataset))
    # what decides how the weights change: a resumed run has it the same
    trainer.made_of = {
        "starting weights": begun,
        "zeros": tuning.zeros,
        "LoRA": [tuning.lora_rank, tuning.lora_alpha, tuning.lora_dropout] if tuning.lora_rank else None,
        "adapters under the mask": bool(tuning.lora_rank) and sparse is not None and tuning.merge == "masked",
        "loss on answers alone": [args.assistant_only_loss, args.completion_only_loss],
    }
    if "input_ids" in left.column_names:
        trainer.made_of["training data"] = digest_of(left)
    return trainer


def _check_lengths(args: FineTuningConfig, what: str, before: datasets.Dataset, after: datasets.Dataset) -> None:
    """Say how many conversations trl has left out as too long. Raises ValueError if these are all."""
    if not len(after):
        raise ValueError(
            f"in none of the {len(before):,} conversations to {what} on does an answer begin within max_length, "
            f"{args.max_length} tokens: raise it as far as the model's positions go, or shorten the prompts"
        )
    if gone := len(before) - len(after):
        _say(
            f"Left out are {gone:,} of the {len(before):,} conversations to {what} on, in which no answer begins "
            f"within max_length, {args.max_length} tokens"
        )


def _tokenizer(name: str, model: PreTrainedModel, train: datasets.Dataset, args: FineTuningConfig) -> Any:
    """The model's own tokenizer, with a chat template where the data need one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} has no tokenizer that can be loaded: {error}") from error
    size = len(cast(torch.Tensor, model.get_input_embeddings().weight))
    if len(tokenizer) > size:
        raise ValueError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens, and the model embeds {size}: put the tokenizer "
            "there that it was trained with"
        )
    if args.eos_token in tokenizer.get_vocab():
        tokenizer.eos_token = args.eos_token
    check_ends(tokenizer, train)
    if args.chat_template_path is None:
        give_template(tokenizer, train, _say)
    return tokenizer


def _lora(tuning: FineTuningArguments, sparse: SparsityHandle | None) -> LoraConfig:
    config = LoraConfig(
        r=tuning.lora_rank,
        lora_alpha=2 * tuning.lora_rank if tuning.lora_alpha is None else tuning.lora_alpha,
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
    _, no_state = without_fail("The file of the log", trainer.save_state)
    if no_state:
        _say(no_state)
    report, failed = without_fail("The report", report_on, output)
    _say(f"report      {report}" if report else failed)


def loss_of_export(exported: Path, trainer: SparseSFTTrainer) -> dict[str, float]:
    """The metrics of an export on the trainer's validation data."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(exported)
    args = copy(trainer.args)
    args.disable_tqdm, args.remove_unused_columns = True, False  # the collator takes what it needs
    plain = Trainer(model=model, args=args, data_collator=trainer.data_collator, eval_dataset=trainer.eval_dataset)
    plain.remove_callback(PrinterCallback)
    return plain.evaluate()


def _say_loss(when: str, metrics: dict[str, float]) -> None:
    _say(f"{when + ':':<12}loss {metrics['eval_loss']:.4f} on the validation answers")


def _say(line: str) -> None:
    if rank_and_world()[0] == 0:
        print(line, flush=True)

"""Pretrain a sparse language model: `accelerate launch train_llama.py --config configs/X.yaml [--field value]…`"""

import os
import sys
from pathlib import Path

import datasets
import torch
from transformers import default_data_collator, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from hf_chts import SparseTrainer, SparseTrainingArguments, SparsityConfig, export_sparse
from hf_chts.command_line import parse_run
from hf_chts.data import DataArguments, load_data, token_byte_lengths
from hf_chts.evaluation import language_modeling_metrics
from hf_chts.export import push_directory
from hf_chts.model_arguments import ModelArguments, build_model, load_config
from hf_chts.report import write_report
from hf_chts.report.figures import training_figure

ROOT = Path(__file__).parent


def main() -> None:
    kinds = (ModelArguments, DataArguments, SparsityConfig, SparseTrainingArguments)
    quiet_console()
    try:
        model_args, data_args, sparsity, args = parse_run(
            kinds, sys.argv[1:], default_config=ROOT / "configs" / "demo.yaml", description=__doc__ or ""
        )
        trainer = build_trainer(model_args, data_args, sparsity, args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"train_llama.py: {' '.join(str(error).split())}") from error  # one line, whoever raised it

    use_all_cores(args)
    trainer.recipe = recipe(model_args, data_args, args) | {
        "warm-up steps after each topology update": trainer.update_warmup_steps,
    }
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    weights = trainer.whole_state_dict()
    if not trainer.is_world_process_zero():
        return
    output = Path(args.output_dir)
    figure = training_figure(trainer.state.log_history, output / "training.png")
    export = export_sparse(
        trainer.accelerator.unwrap_model(trainer.model),
        model_args.export_dir or output / "export",
        state_dict=weights,
        tokenizer=trainer.processing_class,
        training={**trainer.recipe, "optimizer steps": trainer.state.max_steps},
        metrics={name: metrics[f"eval_{name}"] for name in ("loss", "perplexity", "bits_per_byte")},
        figures=[figure],
        packed=model_args.export == "packed",
    )
    report = write_report([output])
    print(
        f"\nloss {metrics['eval_loss']:.4f}, perplexity {metrics['eval_perplexity']:.2f}, "
        f"bits per byte {metrics['eval_bits_per_byte']:.4f} on the validation split; "
        f"sparsity {trainer.sparse.sparsity():.4%}\n"
        f"checkpoint  {get_last_checkpoint(args.output_dir)}\nexport      {export}\n"
        f"metrics     {output / 'eval_results.json'}\nfigure      {figure}\nreport      {report}"
    )
    if args.push_to_hub:
        push(trainer, export)


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, sparsity: SparsityConfig, args: SparseTrainingArguments
) -> SparseTrainer:
    """Everything that can be refused is refused here, before training starts."""
    if args.max_steps > 0:
        sparsity.plan(args.max_steps)
    if sparsity.is_dense and model_args.export == "packed":
        raise ValueError("export packed: a dense model has nothing to pack, leave export plain")
    config = load_config(model_args, ROOT)
    with args.main_process_first(desc="preparing the data"):
        data = load_data(data_args, vocab_size=config.vocab_size, seed=args.seed, shuffle_seed=args.data_seed)
    config.bos_token_id = data.tokenizer.bos_token_id
    config.eos_token_id = data.tokenizer.eos_token_id
    config.pad_token_id = data.tokenizer.pad_token_id
    set_seed(args.seed)
    preprocess_logits, compute_metrics = language_modeling_metrics(
        token_byte_lengths(data.tokenizer, config.vocab_size)
    )
    return SparseTrainer(
        model=build_model(model_args, config),
        args=args,
        sparsity=sparsity,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        data_collator=default_data_collator,
        preprocess_logits_for_metrics=preprocess_logits,
        compute_metrics=compute_metrics,
    )


def push(trainer: SparseTrainer, export: Path) -> None:
    """The export becomes what the repository holds, beside the checkpoints that were pushed on the way."""
    args = trainer.args
    try:
        commit = push_directory(
            export,
            trainer.hub_model_id,
            token=args.hub_token,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            commit_message="End of training",
        )
    except OSError as error:
        raise SystemExit(f"train_llama.py: {' '.join(str(error).split())}") from error
    print(f"hub         {commit.repo_url}")


def quiet_console() -> None:
    """Nothing that a reader of the console or of a log file could do without."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where it is installed, warns if nobody says so
    if not sys.stderr.isatty():
        # of weights written and documents read: lines of thousands of columns in a file
        disable_progress_bar()
        datasets.disable_progress_bars()


def use_all_cores(args: SparseTrainingArguments) -> None:
    """`accelerate launch` leaves a CPU process one thread, unless its config says use_cpu or OMP_NUM_THREADS is set."""
    if args.device.type == "cpu" and torch.get_num_threads() == 1:
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_processes))


def checkpoint_to_resume(args: SparseTrainingArguments) -> str | bool | None:
    """`--resume_from_checkpoint true` stands for the last one in output_dir."""
    given = args.resume_from_checkpoint
    return given.lower() == "true" if given is not None and given.lower() in ("true", "false") else given


def recipe(model_args: ModelArguments, data_args: DataArguments, args: SparseTrainingArguments) -> dict[str, object]:
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "model": model_args.model,
        "dataset": data_args.dataset,
        "optimizer steps": args.max_steps,
        "sequences per step": sequences,
        "tokens per sequence": data_args.block_size,
        "learning rate": args.learning_rate,
        "schedule": args.lr_scheduler_type,
        "seed": args.seed,
    }


if __name__ == "__main__":
    main()

"""`train`: one training run, from options to model, export and report."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainerCallback, default_data_collator, set_seed
from transformers.utils.logging import disable_progress_bar

from hf_chts import SparseTrainer, SparseTrainingArguments, SparsityConfig, export_sparse
from hf_chts.commands import one_line_errors, refusal
from hf_chts.commands.options import parse_run
from hf_chts.data import DataArguments, load_data, token_byte_lengths
from hf_chts.evaluation import language_modeling_metrics
from hf_chts.export import push_directory
from hf_chts.machine import check_can_write, device_line, on_cpu, without_fail
from hf_chts.made_of import made_of
from hf_chts.model_arguments import ModelArguments, build_model, load_config
from hf_chts.plain_text import print_anything
from hf_chts.seal import last_sealed
from hf_chts.training.divergence import last_whole
from hf_chts.training.run_identity import refuse_folder_of_another_run

# Metrics of the validation data that are printed at the end, and their formats
MEASURED = {"loss": ".4f", "perplexity": ".2f", "bits_per_byte": ".4f"}


def train(argv: Sequence[str], program: str) -> None:
    """Train, evaluate, export and report as the options say.

    Args:
        argv: the command line without the program's name.
        program: its name, for --help and errors.

    Raises:
        SystemExit: with a message, where options, data, disk or divergence end the run; with status 1 where the trained
            model could not be evaluated, but was saved. Any other exception is a bug.
    """
    print_anything()
    quiet_console()
    with one_line_errors(program):
        model_args, data_args, sparsity, args = parse_run(
            (ModelArguments, DataArguments, SparsityConfig, SparseTrainingArguments),
            [*(["--use_cpu", "true"] if on_cpu() else []), *argv],  # the user's own options come last and win
            program=program,
            description="Pretrain a sparse language model.",
            default_config="demo",
        )
        use_one_device(args)
        trainer = build_trainer(model_args, data_args, sparsity, args)
    try:
        fit(trainer, program)
        finish(trainer, model_args, program)
    finally:
        ...


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, sparsity: SparsityConfig, args: SparseTrainingArguments
) -> SparseTrainer:
    """Everything that can be refused is refused here, before training starts."""
    if args.max_steps > 0:
        sparsity.plan(args.max_steps)
    if sparsity.is_dense and model_args.export == "packed":
        raise ValueError("export packed: a dense model has nothing to pack, leave export plain")
    if args.batch_eval_metrics:
        raise ValueError("batch_eval_metrics: perplexity and bits per byte are of all tokens at once, leave it out")
    if args.should_save:
        check_can_write(args.output_dir, "output_dir")
        check_can_write(model_args.export_dir or args.output_dir, "the folder of the export")
        if not checkpoint_to_resume(args):  # before data are prepared; train() looks again
            refuse_folder_of_another_run(args.output_dir, set(), overwrite=args.overwrite_output_dir)
    config = load_config(model_args, ROOT)
    use_all_cores(args)
    if args.process_index == 0:
        print(f"Training on {place(args)}", flush=True)
    with args.main_process_first(desc="preparing the data"):
        data = load_data(data_args, vocab_size=config.vocab_size, seed=args.seed, shuffle_seed=args.data_seed)
    config.bos_token_id = data.tokenizer.bos_token_id
    config.eos_token_id = data.tokenizer.eos_token_id
    config.pad_token_id = data.tokenizer.pad_token_id
    set_seed(args.seed)
    preprocess_logits, compute_metrics = language_modeling_metrics(
        token_byte_lengths(data.tokenizer, config.vocab_size)
    )
    trainer = SparseTrainer(
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
    trainer.made_of = made_of(config, data_args, data)
    return trainer


def train(trainer: SparseTrainer, checkpoint: str | bool | None) -> None:
    """What is refused as training starts, resumed or not, ends the program in one line, as divergence and files that
    cannot be read or written do at any time; a ValueError in the midst of training is a fault, and has its traceback.
    """
    first_step = FirstStep()
    trainer.add_callback(first_step)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, ValueError) and first_step.done:
            raise
        raise refused(error) from error


class FirstStep(TrainerCallback):
    """Whether a step of this run has been taken."""

    done = False

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.done = True


def refused(error: Exception) -> SystemExit:
    return SystemExit(f"train_llama.py: {' '.join(str(error).split())}")  # one line, whoever raised it


def evaluated(trainer: SparseTrainer) -> tuple[dict[str, float], str]:
    """What the trained model scores, or nothing and why: its weights are not to be lost over that."""
    if trainer.args.world_size > 1:
        return trainer.evaluate(), ""  # ranks that did not fail would wait for one that goes on
    metrics, failed = without_fail("The evaluation", trainer.evaluate)
    return metrics or {}, failed


def draw(trainer: SparseTrainer, path: Path) -> Path:
    from hf_chts.report.figures import training_figure  # here, for a run can do without matplotlib

    return training_figure(trainer.state.log_history, path)


def report_on(output: Path) -> Path:
    from hf_chts.report import write_report

    return write_report([output])


def exported(
    trainer: SparseTrainer, model_args: ModelArguments, weights: Any, metrics: dict[str, float], figures: list[Path]
) -> tuple[Path, str]:
    """The directory of the export, and why its model card lacks what was measured, if it does."""

    def export(**card: Any) -> Path:
        return export_sparse(
            trainer.accelerator.unwrap_model(trainer.model),
            model_args.export_dir or Path(trainer.args.output_dir) / "export",
            state_dict=weights,
            tokenizer=trainer.processing_class,
            packed=model_args.export == "packed",
            **card,
        )

    recipe = {**trainer.recipe, "optimizer steps": trainer.state.max_steps}
    whole = {"training": recipe, "metrics": metrics, "figures": figures}
    done, failed = without_fail("A model card with recipe and figures", export, **whole)
    try:
        return (done, "") if done else (export(), failed)
    except OSError as error:
        again = "Started again with --resume_from_checkpoint true, the run trains no more and is exported"
        raise refused(OSError(f"{error}. {last_whole(last_sealed(trainer.args.output_dir))}. {again}")) from error


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
        raise refused(error) from error
    print(f"hub         {commit.repo_url}")


def quiet_console() -> None:
    """Nothing that a reader of the console or of a log file could do without."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where it is installed, warns if nobody says so
    if not sys.stderr.isatty():
        # of weights written and documents read: lines of thousands of columns in a file
        disable_progress_bar()
        datasets.disable_progress_bars()


def use_one_device(args: SparseTrainingArguments) -> None:
    """One GPU a process. The Trainer would share a process's batches out over all GPUs that it sees, in threads
    (nn.DataParallel), with more sequences a step than the config says."""
    args._n_gpu = min(args.n_gpu, 1)


def place(args: SparseTrainingArguments) -> str:
    """What this run trains on."""
    precision = getattr(args, "mixed_precision", "bf16" if args.bf16 else "no")
    dtype = "float32" if precision == "no" else f"{precision} mixed precision"
    unused = 0 if args.device.type == "cpu" or args.world_size > 1 else torch.accelerator.device_count() - 1
    return device_line(args.device, processes=args.world_size, dtype=dtype, unused=unused)


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



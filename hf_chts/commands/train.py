"""`train`: a training run from its options to the trained model, its export and its report."""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from hf_chts import SparseTrainer, SparseTrainingArguments, SparsityConfig, export_sparse
from hf_chts.baseline import baseline_line, baseline_of, dense_baseline
from hf_chts.checkpoint.run_folder import last_sealed, refuse_folder_of_another_run
from hf_chts.commands import TOLD, one_line_errors, refusal, without_fail
from hf_chts.commands.from_weights import KeepsResults, StartingModel
from hf_chts.commands.options import parse_run
from hf_chts.config_file import PRESETS_ROOT
from hf_chts.data import BlockStream, DataArguments, LoadedData, load_data, token_byte_lengths
from hf_chts.evaluation import language_modeling_metrics
from hf_chts.export import push_directory
from hf_chts.export.activation_code import refuse_plain
from hf_chts.machine import check_can_write, device_line, on_cpu
from hf_chts.model_arguments import ModelArguments, build_model, load_config
from hf_chts.model_checks import check_causal, check_positions
from hf_chts.plain_text import print_anything
from hf_chts.training.divergence import last_whole
from hf_chts.training.warm_up import asked_warmup

# Metrics of the validation data that are printed at the end, with their formats
MEASURED = {"loss": ".4f", "perplexity": ".2f", "bits_per_byte": ".4f"}
# Settings of the model that no weight depends on
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "dtype", "architectures", "use_cache")
# Settings of the data that decide which blocks there are, and their order; where the data are stored may change
_THE_DATA = (
    "dataset_config", "dataset_split", "text_column", "streaming", "shuffle_buffer", "block_size", "packing",
    "validation_split", "validation_fraction",
)  # fmt: skip
_BLOCKS_READ = 64  # of the training data, for their digest


def train(argv: Sequence[str], program: str) -> None:
    """Train, evaluate, export and report, as the options say.

    Args:
        argv: the command line without the program's name.
        program: its name, for --help and errors.

    Raises:
        SystemExit: with a message of one line where the options, the data, the disk or divergence end the run; with
            status 1 where the model was exported but could not be evaluated. Any other exception is a bug.
    """
    print_anything()
    quiet_console()
    with one_line_errors(program):
        model_args, data_args, sparsity, args = parse_run(
            (ModelArguments, DataArguments, SparsityConfig, SparseTrainingArguments),
            [*(["--use_cpu", "true"] if on_cpu() else []), *argv],  # the user's own options come later and win
            program=program,
            description="Pretrain a sparse language model. On several devices: accelerate launch --config_file FILE "
            "-m hf_chts train …; `hf-chts configs` copies such files to ./configs/accelerate.",
            default_config=PRESETS_ROOT / "configs/demo.yaml",
        )
        use_one_device(args)
        trainer = build_trainer(model_args, data_args, sparsity, args)
    fit(trainer, program)
    finish(trainer, model_args, program)
    if torch.distributed.is_initialized():
        # gloo's threads may abort a process that ends with its process group still there
        torch.distributed.destroy_process_group()


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, sparsity: SparsityConfig, args: SparseTrainingArguments
) -> SparseTrainer:
    """The data, the model and the trainer of a run.

    Raises:
        ValueError, OSError: anything that can be refused before training starts.
    """
    if args.max_steps > 0:
        sparsity.plan(args.max_steps)
    asked_warmup(args, sparsity, args.max_steps)
    config: Any = load_config(model_args)
    if model_args.baseline != "none":
        optimizer = str(getattr(args.optim, "value", args.optim))
        config = dense_baseline(model_args.baseline, config, sparsity, max_steps=args.max_steps, optimizer=optimizer)
        sparsity = SparsityConfig(method="dense")
        if args.process_index == 0:
            print(baseline_line(config), flush=True)
    if sparsity.is_dense and model_args.export == "packed":
        raise ValueError("export packed: a dense model has nothing to pack, leave export plain")
    if model_args.export == "plain":
        refuse_plain(sparsity.activation_topk, "--export packed")
    if args.batch_eval_metrics:
        raise ValueError("batch_eval_metrics: perplexity and bits per byte need all tokens at once, leave it out")
    check_folders(args, model_args.export_dir)
    start = StartingModel.of(model_args, sparsity)
    if start is not None:
        data_args = replace(data_args, tokenizer=start.tokenizer(data_args.tokenizer, config.vocab_size))
    use_all_cores(args)
    if args.process_index == 0:
        print(f"Training on {place(args)}", flush=True)
    with args.main_process_first(desc="preparing the data"):
        data = load_data(data_args, vocab_size=config.vocab_size, seed=args.seed, shuffle_seed=args.data_seed)
    set_seed(args.seed)
    byte_lengths = token_byte_lengths(data.tokenizer, config.vocab_size)
    preprocess_logits, compute_metrics = language_modeling_metrics(byte_lengths)
    weights = "random"
    if start is None:
        config.bos_token_id = data.tokenizer.bos_token_id
        config.eos_token_id = data.tokenizer.eos_token_id
        config.pad_token_id = data.tokenizer.pad_token_id
        # several ranks split or copy what is on the CPU, as their engines do it
        model, sparse = build_model(model_args, config, sparsity, args.device if args.world_size == 1 else "cpu")
        check_causal(model, model_args.model)
        check_positions(model, data_args.block_size)
    else:
        model, sparse, weights = start.make(model_args, data, byte_lengths, args, data_args.block_size)
    trainer = SparseTrainer(
        model=model,
        args=args,
        sparsity=sparse or sparsity,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        data_collator=default_data_collator,
        preprocess_logits_for_metrics=preprocess_logits,
        compute_metrics=compute_metrics,
    )
    trainer.made_of = made_of(model.config, data_args, data) | {"starting weights": weights}
    baseline = baseline_of(model.config)
    trainer.recipe = {
        "model": model_args.model,
        **({"dense baseline": baseline} if baseline else {}),
        "dataset": data_args.dataset,
        "tokens per sequence": data_args.block_size,
    }
    if start is not None:
        trainer.recipe |= start.facts
        trainer.add_callback(KeepsResults(start))
    return trainer


def check_folders(args: Any, export_dir: str | None) -> None:
    """Check where a run writes, before its data are prepared; `train` checks again.

    Raises:
        OSError, ValueError: a folder cannot be written, or another run's checkpoints are there.
    """
    if not args.should_save:
        return
    output = Path(str(args.output_dir))
    check_can_write(output, "output_dir")
    check_can_write(export_dir or output, "the directory of the export")
    if not checkpoint_to_resume(args):
        refuse_folder_of_another_run(str(output), set(), overwrite=args.overwrite_output_dir)


def made_of(config: PreTrainedConfig, args: DataArguments, data: LoadedData) -> dict[str, Any]:
    """What must stay the same when a run is resumed: settings of the model and the data, and a digest of some blocks.

    They are by name, as JSON can hold them. A stream has no digest: its state in the checkpoint identifies it.
    """
    made = {f"model.{name}": value for name, value in config.to_dict().items() if name not in _NOT_THE_MODEL}
    made |= {name: getattr(args, name) for name in _THE_DATA}
    if not isinstance(data.train, BlockStream):
        made["training data"] = digest_of(data.train)
    return made


def digest_of(blocks: Any) -> str:
    """How many blocks there are, and a digest of the tokens of some."""
    number, digest = len(blocks), hashlib.sha256()
    for index in range(0, number, -(-number // _BLOCKS_READ) or 1):
        digest.update(torch.as_tensor(blocks[index]["input_ids"]).to(torch.int64).numpy().tobytes())
    return f"{number} blocks, {digest.hexdigest()[:16]}"


def fit(trainer: SparseTrainer, program: str) -> None:
    """Train, or resume.

    Raises:
        SystemExit: with a message of one line for a ValueError or a missing package before the first step, which the
            user can put right (a later one is a bug), and at any time for divergence and files that cannot be read or
            written.
    """
    first_step = FirstStep()
    trainer.add_callback(first_step)
    try:
        trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer.args))
    except (*TOLD, FloatingPointError) as error:
        if isinstance(error, (ValueError, ImportError)) and first_step.done:
            raise
        raise refusal(program, error) from error


class FirstStep(TrainerCallback):
    """Whether a step of this run has been taken."""

    done = False

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.done = True


def finish(trainer: SparseTrainer, model_args: ModelArguments, program: str) -> None:
    """Evaluate, export, report and push. Whatever else fails, the trained model is exported."""
    args = trainer.args
    metrics, no_metrics = evaluate(trainer)
    weights = trainer.whole_state_dict()
    if not trainer.is_world_process_zero():
        return
    output = Path(str(args.output_dir))
    figure, no_figure = without_fail("The figure", draw, trainer, output / "training.png")
    measured = {name: metrics[f"eval_{name}"] for name in MEASURED if f"eval_{name}" in metrics}
    with one_line_errors(program):
        exported, no_card = export(trainer, model_args, weights, measured, [figure] if figure else [])
    _, no_file = without_fail("The file of the metrics", trainer.save_metrics, "eval", metrics)
    _, no_state = without_fail("The file of the log", trainer.save_state)
    report, no_report = without_fail("The report", report_on, output)
    figures = [f"{name.replace('_', ' ')} {value:{MEASURED[name]}}" for name, value in measured.items()]
    print(f"\n{', '.join(figures) or 'nothing'} on the validation split; sparsity {trainer.sparse.sparsity():.4%}")
    written = {
        "checkpoint": last_sealed(output),
        "export": exported,
        "metrics": output / "eval_results.json",
        "figure": figure,
        "report": report,
    }
    print("\n".join(f"{name:<12}{path}" for name, path in written.items() if path))
    for reason in filter(None, (no_metrics, no_figure, no_card, no_file, no_state, no_report)):
        print(f"{program}: {reason}", file=sys.stderr)
    if args.push_to_hub:
        with one_line_errors(program):
            push(trainer, exported)
    if no_metrics:
        raise SystemExit(1)


def evaluate(trainer: SparseTrainer) -> tuple[dict[str, float], str]:
    """The metrics of the trained model, or none and why: a failed evaluation must not cost the weights."""
    if trainer.args.world_size > 1:
        return trainer.evaluate(), ""  # ranks that did not fail would wait for one that goes on
    metrics, failed = without_fail("The evaluation", trainer.evaluate)
    return metrics or {}, failed


def draw(trainer: SparseTrainer, path: Path) -> Path:
    from hf_chts.report.figures import training_figure  # late, because a run can do without matplotlib

    return training_figure(trainer.state.log_history, path)


def report_on(output: Path) -> Path:
    from hf_chts.report import write_report

    return write_report([output])


def export(
    trainer: SparseTrainer, model_args: ModelArguments, weights: Any, metrics: dict[str, float], figures: list[Path]
) -> tuple[Path, str]:
    """Export the model. Returns the directory, and why its model card lacks recipe and figures, if it does.

    Raises:
        OSError: the directory cannot be written; the message names the last whole checkpoint.
    """
    output = Path(str(trainer.args.output_dir))

    def write(**card: Any) -> Path:
        return export_sparse(
            trainer.accelerator.unwrap_model(trainer.model),
            model_args.export_dir or output / "export",
            state_dict=weights,
            tokenizer=cast(PreTrainedTokenizerBase, trainer.processing_class),
            packed=model_args.export == "packed",
            **card,
        )

    recipe = {**trainer.training_facts(), "optimizer steps": trainer.state.max_steps}
    card = {"training": recipe, "metrics": metrics, "figures": figures}
    exported, failed = without_fail("A model card with recipe and figures", write, **card)
    try:
        return (exported, "") if exported else (write(), failed)
    except OSError as error:
        again = "Started again with --resume_from_checkpoint true, the run trains no more and is exported"
        raise OSError(f"{error}. {last_whole(last_sealed(output))}. {again}") from error


def push(trainer: SparseTrainer, exported: Path) -> None:
    """Push the export: it becomes the contents of the repository, beside the checkpoints pushed during training."""
    args = trainer.args
    commit = push_directory(
        exported,
        trainer.hub_model_id,
        token=args.hub_token,
        private=args.hub_private_repo,
        revision=args.hub_revision,
        commit_message="End of training",
    )
    print(f"hub         {commit.repo_url}")


def quiet_console() -> None:
    """Silence what would only clutter a log file."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, if installed, warns that it has to guess
    if not sys.stderr.isatty():
        # bars of weights written and documents read become lines of thousands of columns in a file
        disable_progress_bar()
        datasets.disable_progress_bars()


def use_one_device(args: SparseTrainingArguments) -> None:
    """Use one GPU per process. By default the Trainer spreads a process's batches over all GPUs that it sees
    (nn.DataParallel), with more sequences per step than the config says."""
    args._n_gpu = min(args.n_gpu, 1)


def place(args: SparseTrainingArguments) -> str:
    """Device and precision of this run, in words."""
    precision = getattr(args, "mixed_precision", "bf16" if args.bf16 else "no")
    dtype = "float32" if precision == "no" else f"{precision} mixed precision"
    unused = 0 if args.device.type == "cpu" or args.world_size > 1 else torch.accelerator.device_count() - 1
    return device_line(args.device, processes=args.world_size, dtype=dtype, unused=unused)


def use_all_cores(args: SparseTrainingArguments) -> None:
    """Share the cores out over CPU processes, which `accelerate launch` leaves one thread each unless its config says
    use_cpu or OMP_NUM_THREADS is more. Without a launcher it is the user who set OMP_NUM_THREADS to 1."""
    launched = "ACCELERATE_USE_CPU" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
    if "OMP_NUM_THREADS" in os.environ and not launched:
        return
    if args.device.type == "cpu" and torch.get_num_threads() == 1:
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_processes))


def checkpoint_to_resume(args: TrainingArguments) -> str | bool | None:
    """The checkpoint to resume from; True, from `--resume_from_checkpoint true`, is the newest one in output_dir."""
    given = args.resume_from_checkpoint
    return {"true": True, "false": False}.get(str(given).lower(), given)

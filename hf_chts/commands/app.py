"""The command `hf-chts`, also `python -m hf_chts`.

Each command imports what it needs when it runs, so that --help need not wait for torch.
"""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from hf_chts.commands import end_rank, one_line_errors
from hf_chts.plain_text import print_anything

# pretty exceptions would hide the traceback of a bug among the locals of transformers
_SETTINGS: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False}
# for commands whose options are fields of dataclasses, --help too
_PASSED_ON: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "add_help_option": False,
}

EVALUATE_EPILOG = """\
Local data: --task_data DIR runs the harness's own prompts on files of yours, DIR/TASK/SPLIT.jsonl (or .json, .csv,
.parquet, .gz of these), such as DIR/rte/validation.jsonl or DIR/mnli/validation_matched.jsonl, with the columns that
the task's data set has on the Hub. DIR may also hold clones of the Hub's repositories (such as DIR/glue/rte).

Network: the embedded suite never uses it. For the others, set HF_HUB_OFFLINE=1 on a machine without one: tasks whose
data is not cached are then skipped at once.

Exit status: 0, all was evaluated; 1, nothing was, an option is wrong, or the results could not be written and are
printed instead; 3, some tasks or models were left out, which are named at the end (accelerate launch makes it 1).
"""

app = typer.Typer(name="hf-chts", help="Pretrain sparse language models, and what comes before and after.", **_SETTINGS)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `hf-chts` with these arguments, by default those of the process.

    Raises:
        SystemExit: unless all went well: status 2 for a wrong option, else a message of one line.
    """
    print_anything()
    _run(app, sys.argv[1:] if argv is None else argv, "hf-chts")


def run_alone(command: Callable[..., None], program: str, **settings: Any) -> None:
    """Run one command as the script `program`, with the arguments of the process."""
    print_anything()
    alone = typer.Typer(**_SETTINGS)
    alone.command(**settings)(one_line_errors(program)(command))
    _run(alone, sys.argv[1:], program)
    end_rank()


def _run(commands: typer.Typer, argv: Sequence[str], program: str) -> None:
    try:
        commands(list(argv), prog_name=program)
    except SystemExit as end:
        if end.code:  # typer ends the process also where all went well
            raise


@app.command(**_PASSED_ON)
def train(context: typer.Context) -> None:
    """Train a sparse model; on several devices: accelerate launch --config_file FILE -m hf_chts train …"""
    from hf_chts.commands.train import train

    train(context.args, program="hf-chts train")


@app.command(**_PASSED_ON)
def fine_tune(context: typer.Context) -> None:
    """Fine-tune a sparse model on instructions, with trl and perhaps LoRA, and export it."""
    try:
        from hf_chts.commands.fine_tune import fine_tune
    except ModuleNotFoundError as error:
        if error.name not in ("trl", "peft"):
            raise
        raise SystemExit(f"hf-chts fine-tune needs {error.name}: pip install 'hf_chts[finetune]'") from error
    fine_tune(context.args, program="hf-chts fine-tune")


def _batch_size(text: Any) -> Any:
    return text if text == "auto" else int(text)


def evaluate(
    models: Annotated[
        list[str],
        Argument(metavar="DIR_OR_HUB_ID...", help="Exported directories, plain or packed, checkpoints, or Hub ids."),
    ],
    suite: Annotated[
        str,
        Option(
            metavar="SUITE_OR_TASK,...",
            help="embedded, glue, superglue, commonsense, perplexity, or tasks of the harness.",
        ),
    ] = "embedded",
    limit: Annotated[
        int | None, Option(metavar="N", help="Documents of each task, from its start.", show_default="all")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        Option(
            "--num_fewshot",
            metavar="K",
            help="Examples before each question.",
            show_default="each task's own number, most often 0",
        ),
    ] = None,
    batch_size: Annotated[
        Any,
        Option(
            "--batch_size",
            parser=_batch_size,
            metavar="N|auto",
            help="Sequences per forward pass. auto: as many as fit into memory, at most 64.",
        ),
    ] = 8,
    max_length: Annotated[
        int | None,
        Option(
            "--max_length",
            metavar="N",
            help="Tokens of context, at most the model's max_position_embeddings.",
            show_default="max_position_embeddings",
        ),
    ] = None,
    task_data: Annotated[
        Path | None,
        Option(
            "--task_data",
            metavar="DIR",
            help="Data files of tasks, DIR/TASK/SPLIT.jsonl, see below.",
            show_default="all data from the Hub or its cache",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        Option(metavar="DIR_OR_HUB_ID", help="The model that the others are compared with.", show_default="the first"),
    ] = None,
    tokenizer: Annotated[
        str | None,
        Option(metavar="DIR_OR_HUB_ID", help="Tokenizer for all models.", show_default="the one saved with each"),
    ] = None,
    device: Annotated[str | None, Option(help="Such as cpu or cuda:1.", show_default="the first GPU, else cpu")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Option(help="Number format of the weights. auto: as saved.")
    ] = "auto",
    compute: Annotated[
        Literal["dense", "sparse"],
        Option(help="sparse: keep the weights of exports packed in memory, and multiply with the links alone."),
    ] = "dense",
    unsealed: Annotated[
        bool,
        Option(
            "--unsealed", help="Evaluate checkpoints even where their seal is missing or does not match their files."
        ),
    ] = False,
    revision: Annotated[str, Option(help="Branch, tag or commit of Hub ids.")] = "main",
    output: Annotated[
        Path,
        Option(
            metavar="FILE",
            help="JSON file for the results. A table and a figure go beside it, as .md and .png. All are replaced "
            "after each model.",
        ),
    ] = Path("results.json"),
) -> None:
    """Evaluate language models on lm-eval tasks, side by side.

    Prints results with standard errors, trivial baselines and the differences between models. Under accelerate launch,
    the documents are shared out over the processes.
    """
    if suite == "embedded" and all(Path(name).is_dir() for name in (*models, tokenizer) if name):
        # nothing here needs a network; huggingface_hub reads this when it is imported, which the next line does
        os.environ["HF_HUB_OFFLINE"] = "1"
    from hf_chts.commands.evaluate import evaluate

    evaluate(
        models,
        suite,
        output,
        baseline,
        tokenizer=tokenizer,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        max_length=max_length,
        device=device,
        dtype=dtype,
        compute=compute,
        revision=revision,
        task_data=task_data,
        unsealed=unsealed,
    )


app.command(epilog=EVALUATE_EPILOG)(one_line_errors("hf-chts evaluate")(evaluate))


@app.command()
@one_line_errors("hf-chts configs")
def configs() -> None:
    """Copy the presets, and configs for accelerate launch, to ./configs, to use or to change."""
    from hf_chts.config_file import PRESETS_ROOT

    target = Path("configs")  # by which the copies name each other
    if target.exists():
        raise FileExistsError(f"there is a {target} here already: name its files, or go to another directory")
    print(f"configs  {shutil.copytree(PRESETS_ROOT / target, target)}")


@app.command(**_PASSED_ON)
@one_line_errors("hf-chts prepare")
def prepare(context: typer.Context) -> None:
    """Tokenize a corpus once, into memory-mapped shards to train on."""
    from hf_chts.commands.prepare import prepare

    prepare(context.args, program="hf-chts prepare")


@app.command()
@one_line_errors("hf-chts push")
def push(
    directory: Annotated[
        str, Argument(metavar="DIR", help="An export, plain or packed, or a checkpoint. It is not changed.")
    ],
    repo_id: Annotated[str, Argument(metavar="REPO", help="NAMESPACE/NAME on the Hub, created if missing.")],
    further_figures: Annotated[list[str] | None, Argument(metavar="[FIGURE]...", hidden=True)] = None,
    private: Annotated[bool, Option("--private", help="Make the repository private if it is created here.")] = False,
    revision: Annotated[
        str | None, Option(metavar="BRANCH", help="Branch, created if missing.", show_default="main")
    ] = None,
    commit_message: Annotated[
        str | None,
        Option(
            "--commit_message",
            metavar="TEXT",
            help="Message of the commit.",
            show_default="Upload sparse model with hf_chts",
        ),
    ] = None,
    results: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="Zero-shot results for the model card, as written by hf-chts evaluate --output.",
            show_default="DIR/zero_shot.json if it exists",
        ),
    ] = None,
    figures: Annotated[
        list[str] | None,
        Option(
            metavar="FILE...", help="Pictures for the model card, such as training.png.", show_default="DIR/figures"
        ),
    ] = None,
) -> None:
    """Push an export to the Hub, with the token of `hf auth login` or of HF_TOKEN."""
    from hf_chts.export.hub import push_directory

    commit = push_directory(
        directory,
        repo_id,
        private=private or None,
        revision=revision,
        commit_message=commit_message,
        results=results,
        figures=[*(figures or []), *(further_figures or [])],  # --figures A B: B is left to the arguments
    )
    print(f"pushed  {commit.repo_url}\ncommit  {commit.commit_url}")


@app.command()
@one_line_errors("hf-chts study")
def study(
    path: Annotated[
        Path, Argument(metavar="STUDY.yaml", help="A file, or a study of the project: classification, language, …")
    ],
    results: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            help="Folder of result files.",
            show_default="results/NAME beside the study; of the project's, studies/results/NAME",
        ),
    ] = None,
    scratch: Annotated[Path, Option(metavar="DIR", help="Checkpoints and logs of unfinished runs.")] = Path(
        "runs/studies"
    ),
    quick: Annotated[bool, Option("--quick", help="The study's short form, which takes minutes.")] = False,
    only: Annotated[str, Option(metavar="K/N", help="The K-th part of N, as 17/64, for a job array.")] = "1/1",
    row: Annotated[list[str] | None, Option(metavar="NAME", help="This row alone; may be repeated.")] = None,
    page: Annotated[bool, Option("--page", help="Run nothing, and write the page of what is there.")] = False,
) -> None:
    """Run what is missing of a study, and write a page of its results."""
    from hf_chts.commands.study import study

    study(path, results, scratch, quick=quick, only=only, rows=row or [], page=page)


Source = Annotated[str, Argument(metavar="DIR", help="Directory to read.")]
Target = Annotated[str, Argument(metavar="OUT", help="Directory to write, new or empty.")]
ShardSize = Annotated[
    str, Option("--max_shard_size", metavar="SIZE", help="Largest size of a weights file, as in save_pretrained.")
]


@app.command()
@one_line_errors("hf-chts pack")
def pack(source: Source, target: Target, max_shard_size: ShardSize = "50GB") -> None:
    """Store the weights of a plain export as mask bits and link values."""
    from hf_chts.export.convert import pack_directory

    print(f"packed  {pack_directory(source, target, max_shard_size=max_shard_size)}")


@app.command()
@one_line_errors("hf-chts unpack")
def unpack(source: Source, target: Target, max_shard_size: ShardSize = "50GB") -> None:
    """Turn a packed export into a plain one, bit for bit."""
    from hf_chts.export.convert import unpack_directory

    print(f"plain  {unpack_directory(source, target, max_shard_size=max_shard_size)}")


@app.command()
@one_line_errors("hf-chts report")
def report(
    runs: Annotated[list[str], Argument(metavar="RUN_DIR...", help="output_dir of a run. Several are compared.")],
    output: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="HTML file to write, with a directory of its figures beside it.",
            show_default="RUN_DIR/report.html, or report.html here for several runs",
        ),
    ] = None,
    layers: Annotated[str, Option(metavar="PATTERN", help="Layers to show one by one, such as '*.down_proj'.")] = "*",
    circuit: Annotated[
        str | None,
        Option(metavar="PROMPT", help="Trace this text through each run's last checkpoint, and show the circuit."),
    ] = None,
) -> None:
    """Write an HTML report of one or more runs."""
    from hf_chts.report import write_report

    if circuit is not None:
        from hf_chts.report.circuit import write_circuit

        for run in runs:
            print(f"circuit  {write_circuit(run, circuit)}")
    print(f"report  {write_report(runs, output, layers)}")

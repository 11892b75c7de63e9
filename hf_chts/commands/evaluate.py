"""`evaluate`: lm-eval tasks on one or more models, side by side."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

# for scripts that look at the exit status
SOME_LEFT_OUT = 3

EPILOG = """\
Local data: --task_data DIR runs the harness's own prompts on files of yours, DIR/TASK/SPLIT.jsonl (or .json, .csv,
.parquet, .gz of these), such as DIR/rte/validation.jsonl or DIR/mnli/validation_matched.jsonl, with the columns that
the task's data set has on the Hub. DIR may also hold clones of the Hub's repositories (such as DIR/glue/rte).

Network: the embedded suite never uses it. For the others, set HF_HUB_OFFLINE=1 on a machine without one: tasks whose
data is not cached are then skipped at once.

Exit status: 0, all was evaluated; 1, nothing was, an option is wrong, or the results could not be written and are
printed instead; 3, some tasks or models were left out, which are named at the end (accelerate launch makes it 1).
"""


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
        # nothing here needs a network; huggingface_hub reads this when it is imported, which the lines below do
        os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils.logging import disable_progress_bar

    from hf_chts.evaluation import check_model, evaluate_zero_shot, results_table, write_report, write_results
    from hf_chts.evaluation.checks import check_options
    from hf_chts.evaluation.comparison import baseline_index
    from hf_chts.evaluation.result_files import check_output, results_json
    from hf_chts.evaluation.zero_shot import default_device
    from hf_chts.machine import device_line, without_fail

    if not sys.stderr.isatty():
        disable_progress_bar()  # of loading weights
    # check everything before the first model takes its hours
    check_output(output)
    check_options(limit, num_fewshot, batch_size, device, task_data)
    baseline_index(models, baseline)
    for model in models:
        check_model(model, revision=revision, tokenizer=tokenizer is None, max_length=max_length, unsealed=unsealed)

    ranks, first = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)) == 0
    if not first:
        logging.getLogger("hf_chts.evaluation").setLevel(logging.ERROR)
    else:
        where = device_line(device or default_device(), processes=ranks, dtype=f"dtype {dtype}")
        print(f"Evaluating on {where}", file=sys.stderr, flush=True)
    results: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    unwritten: Exception | None = None
    for number, model in enumerate(models, start=1):
        if first:
            print(f"Model {number} of {len(models)}: {model}", file=sys.stderr, flush=True)
        try:
            result = evaluate_zero_shot(
                model,
                suite,
                tokenizer=tokenizer,
                limit=limit,
                num_fewshot=num_fewshot,
                batch_size=batch_size,
                max_length=max_length,
                device=device,
                dtype=dtype,
                revision=revision,
                task_data=task_data,
                progress=True,
                unsealed=unsealed,
            )
        except Exception as error:
            if ranks > 1 or len(models) == 1:
                raise  # the other ranks may not have failed
            failed[model] = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"{model} could not be evaluated: {failed[model]}", file=sys.stderr, flush=True)
            continue
        if result:  # empty on all ranks but the first
            results.append(result)
            compared_with = baseline if baseline in [done["model"] for done in results] else None
            try:
                write_results(results, output, baseline=compared_with)
                unwritten = None
            except Exception as error:  # the remaining models may take hours, and the results can be printed
                unwritten = error
                print(f"{output} could not be written: {error}", file=sys.stderr, flush=True)
            # after the results, from which table and figure can be made again at any time
            report, no_report = without_fail(
                "The table and the figure", write_report, results, output, baseline=compared_with
            )
    if ranks > 1:
        _leave_ranks()
    if not first:
        return
    if not results:
        raise ValueError("no model could be evaluated. " + " ".join(f"{m}: {why}" for m, why in failed.items()))
    table, no_table = without_fail("This table", results_table, results, baseline=compared_with)
    print(table or no_table)
    for model, why in failed.items():
        print(f"\nNot evaluated: {model}: {why}")
    if unwritten is not None:
        print(results_json(results))
        raise ValueError(f"the results, printed above, could not be written to {output}: {unwritten}")
    print(f"\nResults: {output}{f', {report[0].name}, {report[1].name}' if report else f'. {no_report}'}")
    if failed or any(result["skipped"] for result in results):
        raise typer.Exit(SOME_LEFT_OUT)


def _leave_ranks() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

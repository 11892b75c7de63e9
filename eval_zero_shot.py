"""Evaluate exported models on lm-eval tasks, side by side.

python eval_zero_shot.py runs/demo/export
python eval_zero_shot.py runs/dense runs/chts org/name --suite commonsense,wikitext --output results.json
accelerate launch eval_zero_shot.py runs/chts --suite glue          # shares the documents out over the GPUs
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

# for scripts that look at the exit status
SOME_LEFT_OUT = 3

EPILOG = """\
Local data: --task_data DIR runs the harness's own prompts on files of yours, DIR/TASK/SPLIT.jsonl (or .json, .csv,
.parquet, .gz of these), such as DIR/rte/validation.jsonl or DIR/mnli/validation_matched.jsonl, with the columns that
the task's data set has on the Hub. DIR may as well hold clones of the Hub's repositories (such as DIR/glue/rte).

Network: the embedded suite never uses it. For the others, set HF_HUB_OFFLINE=1 on a machine without one: tasks whose
data is not cached are then skipped at once.

Exit status: 0, all was evaluated; 1, nothing was, an option is wrong, or the results could not be written and are
printed instead; 3, some tasks or models were left out, which are named at the end (accelerate launch makes 1 of it).
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Evaluate language models on lm-eval tasks and print their results side by side, with standard "
        "errors, trivial baselines and the differences between models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="DIR_OR_HUB_ID",
        help="exported directories, plain or packed, checkpoints, or Hub ids",
    )
    parser.add_argument(
        "--suite",
        default="embedded",
        metavar="SUITE_OR_TASK,...",
        help="embedded, glue, superglue, commonsense, perplexity, or harness tasks (default: embedded)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="documents per task, from its beginning (default: all)")
    parser.add_argument(
        "--num_fewshot",
        type=int,
        metavar="K",
        help="examples before each question (default: each task's own number, most often 0)",
    )
    parser.add_argument(
        "--batch_size",
        type=lambda text: text if text == "auto" else int(text),
        default=8,
        metavar="N|auto",
        help="sequences per forward; auto: as many as fit into memory, at most 64 (default: 8)",
    )
    parser.add_argument(
        "--max_length",
        type=int,
        metavar="N",
        help="tokens of context, at most the model's max_position_embeddings (default: that)",
    )
    parser.add_argument(
        "--task_data",
        type=Path,
        metavar="DIR",
        help="data files of tasks, DIR/TASK/SPLIT.jsonl, see below (default: all data from the Hub or its cache)",
    )
    parser.add_argument(
        "--baseline",
        metavar="DIR_OR_HUB_ID",
        help="the one of the models that the others are compared with (default: the first)",
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR_OR_HUB_ID", help="tokenizer for all models (default: the one saved with each)"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU, else cpu)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="number format of the weights (default: auto, as saved)",
    )
    parser.add_argument(
        "--unsealed",
        action="store_true",
        help="evaluate checkpoints also where their seal is missing or is not that of their files (default: refuse)",
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit of Hub ids (default: main)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results.json"),
        metavar="FILE",
        help="JSON file for the results; a table and a figure, FILE with .md and .png, go beside it; replaced if they "
        "exist, after each model (default: results.json)",
    )
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    named = [*options.models, *([options.tokenizer] if options.tokenizer else [])]
    if options.suite == "embedded" and all(Path(name).is_dir() for name in named):
        # Read when huggingface_hub is imported, so before the imports below: nothing here needs a network
        os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils.logging import disable_progress_bar

    from hf_chts.evaluation import check_model, evaluate_zero_shot, results_table, write_report, write_results
    from hf_chts.evaluation.checks import check_options
    from hf_chts.evaluation.comparison import baseline_index
    from hf_chts.evaluation.result_files import check_output, results_json
    from hf_chts.evaluation.zero_shot import default_device
    from hf_chts.machine import device_line, without_fail
    from hf_chts.plain_text import print_anything

    print_anything()

    if not sys.stderr.isatty():
        disable_progress_bar()  # of weights read
    # all of it, before the first model takes its hours
    check_output(options.output)
    check_options(options.limit, options.num_fewshot, options.batch_size, options.device, options.task_data)
    baseline_index(options.models, options.baseline)
    for model in options.models:
        check_model(
            model,
            revision=options.revision,
            tokenizer=options.tokenizer is None,
            max_length=options.max_length,
            unsealed=options.unsealed,
        )

    ranks, first = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)) == 0
    if not first:
        logging.getLogger("hf_chts.evaluation").setLevel(logging.ERROR)
    else:
        where = device_line(options.device or default_device(), processes=ranks, dtype=f"dtype {options.dtype}")
        print(f"Evaluating on {where}", file=sys.stderr, flush=True)
    results: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    unwritten: Exception | None = None
    for number, model in enumerate(options.models, start=1):
        if first:
            print(f"Model {number} of {len(options.models)}: {model}", file=sys.stderr, flush=True)
        try:
            result = evaluate_zero_shot(
                model,
                options.suite,
                tokenizer=options.tokenizer,
                limit=options.limit,
                num_fewshot=options.num_fewshot,
                batch_size=options.batch_size,
                max_length=options.max_length,
                device=options.device,
                dtype=options.dtype,
                revision=options.revision,
                task_data=options.task_data,
                progress=True,
                unsealed=options.unsealed,
            )
        except Exception as error:
            if ranks > 1 or len(options.models) == 1:
                raise  # the other ranks may not have failed
            failed[model] = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"{model} could not be evaluated: {failed[model]}", file=sys.stderr, flush=True)
            continue
        if result:  # empty on all ranks but the first
            results.append(result)
            baseline = options.baseline if options.baseline in [done["model"] for done in results] else None
            try:
                write_results(results, options.output, baseline=baseline)
                unwritten = None
            except Exception as error:  # the models that are left may take hours, and what there is can be printed
                unwritten = error
                print(f"{options.output} could not be written: {error}", file=sys.stderr, flush=True)
            # after the results: table and figure can be made of them at any time
            report, no_report = without_fail(
                "The table and the figure", write_report, results, options.output, baseline=baseline
            )
    if ranks > 1:
        leave_ranks()
    if not first:
        return 0
    if not results:
        raise ValueError("no model could be evaluated. " + " ".join(f"{m}: {why}" for m, why in failed.items()))
    table, no_table = without_fail("This table", results_table, results, baseline=baseline)
    print(table or no_table)
    for model, why in failed.items():
        print(f"\nNot evaluated: {model}: {why}")
    if unwritten is not None:
        print(results_json(results))
        raise ValueError(f"the results, printed above, could not be written to {options.output}: {unwritten}")
    print(f"\nResults: {options.output}{f', {report[0].name}, {report[1].name}' if report else f'. {no_report}'}")
    return SOME_LEFT_OUT if failed or any(result["skipped"] for result in results) else 0


def leave_ranks() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        status = main()
    except (ValueError, OSError) as error:
        # one line, whatever the library underneath had to say
        sys.exit(f"eval_zero_shot.py: error: {' '.join(str(error).split())}")
    sys.exit(status)

"""Evaluate exported models on lm-eval tasks, side by side.

python eval_zero_shot.py runs/demo/export
python eval_zero_shot.py runs/dense runs/chts org/name --suite commonsense,wikitext --output results.json
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Evaluate language models on lm-eval tasks and print their results side by side.",
        epilog="The embedded suite never uses the network. For the others, set HF_HUB_OFFLINE=1 on a machine without "
        "one: tasks whose data is not cached are then skipped at once.",
    )
    parser.add_argument("models", nargs="+", metavar="DIR_OR_HUB_ID", help="exported directories or Hub ids")
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
        help="sequences per forward; auto: as many as fit into memory (default: 8)",
    )
    parser.add_argument(
        "--max_length",
        type=int,
        metavar="N",
        help="tokens of context, at most the model's max_position_embeddings (default: that)",
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR_OR_HUB_ID", help="tokenizer for all models (default: the one saved with each)"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU, else cpu)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto, as saved)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of Hub ids (default: main)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results.json"),
        metavar="FILE",
        help="JSON file for the results, replaced if it exists (default: results.json)",
    )
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.suite == "embedded" and all(Path(model).is_dir() for model in options.models):
        # Read when huggingface_hub is imported, so before the imports below: nothing here needs a network
        os.environ["HF_HUB_OFFLINE"] = "1"
    from hf_chts.evaluation import check_model, evaluate_zero_shot, results_table, write_results

    if options.output.is_dir():
        raise IsADirectoryError(f"--output {options.output} is a directory: name a file.")
    for model in options.models:  # all of them, before the first takes its hours
        check_model(model, revision=options.revision, tokenizer=options.tokenizer is None)
    results: list[dict[str, Any]] = []
    for model in options.models:
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
            progress=True,
        )
        if result:  # empty on all ranks but the first
            results.append(result)
            write_results(results, options.output)
    if results:
        print(results_table(results))
        print(f"\nResults: {options.output}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        # one line, whatever the library underneath had to say
        sys.exit(f"eval_zero_shot.py: error: {' '.join(str(error).split())}")

"""`evaluate`: lm-eval tasks on one or more models, side by side."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
import typer
from transformers.utils.logging import disable_progress_bar

from hf_chts import evaluation
from hf_chts.commands import without_fail
from hf_chts.evaluation.checks import check_options
from hf_chts.evaluation.comparison import baseline_index
from hf_chts.evaluation.packed import check_compute
from hf_chts.evaluation.result_files import check_output, results_json
from hf_chts.evaluation.zero_shot import default_device
from hf_chts.machine import device_line

# exit status where some tasks or models were left out, for scripts that look at it
SOME_LEFT_OUT = 3


def evaluate(models: Sequence[str], suite: str, output: Path, baseline: str | None, **settings: Any) -> None:
    """Evaluate models one after another, write the results after each, and print their table.

    Args:
        models, suite, settings: as `evaluate_zero_shot` takes them.
        output: the JSON file of the results.
        baseline: the model that the others are compared with; None: the first.

    Raises:
        ValueError, OSError: an option is wrong, no model could be evaluated, or the results could not be written.
        typer.Exit: some tasks or models were left out.
    """
    if not sys.stderr.isatty():
        disable_progress_bar()  # of loading weights
    _check(models, output, baseline, settings)  # before the first model takes its hours
    ranks, first = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)) == 0
    if first:
        dtype = f"dtype {settings['dtype']}"
        _say(f"Evaluating on {device_line(settings['device'] or default_device(), processes=ranks, dtype=dtype)}")
    else:
        logging.getLogger("hf_chts.evaluation").setLevel(logging.ERROR)
    outcome = Outcome(output, baseline)
    for number, model in enumerate(models, start=1):
        if first:
            _say(f"Model {number} of {len(models)}: {model}")
        try:
            result = evaluation.evaluate_zero_shot(model, suite, **settings, progress=True)
        except Exception as error:
            if ranks > 1 or len(models) == 1:
                raise  # the other ranks may not have failed
            outcome.failed[model] = " ".join(f"{type(error).__name__}: {error}".split())
            _say(f"{model} could not be evaluated: {outcome.failed[model]}")
        else:
            if result:  # empty on all ranks but the first
                outcome.add(result)
    if ranks > 1 and dist.is_initialized():
        dist.destroy_process_group()
    if first:
        outcome.show()


def _check(models: Sequence[str], output: Path, baseline: str | None, settings: Mapping[str, Any]) -> None:
    check_output(output)
    check_options(*(settings[name] for name in ("limit", "num_fewshot", "batch_size", "device", "task_data")))
    check_compute(settings.get("compute", "dense"))
    baseline_index(models, baseline)
    shared = {name: settings[name] for name in ("revision", "max_length", "unsealed")}
    for model in models:
        evaluation.check_model(model, tokenizer=settings["tokenizer"] is None, **shared)


@dataclass
class Outcome:
    """The results so far, kept in a file with a table and a figure beside it, and the models that failed."""

    output: Path
    baseline: str | None
    results: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    unwritten: Exception | None = None
    beside: str = ""

    @property
    def compared_with(self) -> str | None:
        """The baseline, once it has been evaluated."""
        return self.baseline if self.baseline in [result["model"] for result in self.results] else None

    def add(self, result: dict[str, Any]) -> None:
        """Write all results. If that fails, the remaining models, which may take hours, go on."""
        self.results.append(result)
        try:
            evaluation.write_results(self.results, self.output, baseline=self.compared_with)
            self.unwritten = None
        except Exception as error:
            self.unwritten = error
            _say(f"{self.output} could not be written: {error}")
        # after the results, from which table and figure can be made again at any time
        written, failure = without_fail(
            "The table and the figure", evaluation.write_report, self.results, self.output, baseline=self.compared_with
        )
        self.beside = f", {written[0].name}, {written[1].name}" if written else f". {failure}"

    def show(self) -> None:
        """Print the table, what was left out, and where the results are, or themselves if they are nowhere."""
        if not self.results:
            reasons = " ".join(f"{model}: {why}" for model, why in self.failed.items())
            raise ValueError(f"no model could be evaluated. {reasons}")
        table, failure = without_fail("This table", evaluation.results_table, self.results, baseline=self.compared_with)
        print(table or failure)
        for model, why in self.failed.items():
            print(f"\nNot evaluated: {model}: {why}")
        if self.unwritten is not None:
            print(results_json(self.results))
            raise ValueError(f"the results, printed above, could not be written to {self.output}: {self.unwritten}")
        print(f"\nResults: {self.output}{self.beside}")
        if self.failed or any(result["skipped"] for result in self.results):
            raise typer.Exit(SOME_LEFT_OUT)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""Names for lists of lm-eval tasks."""

import difflib
from collections.abc import Collection

from hf_chts.evaluation.embedded_suite import EMBEDDED_TASKS

SUITES: dict[str, tuple[str, ...]] = {
    "embedded": EMBEDDED_TASKS,
    "glue": ("cola", "mnli", "mnli_mismatch", "mrpc", "qnli", "qqp", "rte", "sst2", "wnli"),
    "superglue": ("boolq", "cb", "copa", "multirc", "record", "wic", "wsc", "sglue_rte"),
    "commonsense": (
        "hellaswag",
        "piqa",
        "arc_easy",
        "arc_challenge",
        "winogrande",
        "openbookqa",
        "boolq",
        "lambada_openai",
    ),
    "perplexity": ("wikitext",),
}


def suite_tasks(suite: str) -> list[str]:
    """The names of the tasks in `suite`, a comma-separated list of suites and tasks; each name once.

    Other names than those of suites are not checked here, but by `check_task_names`.

    Raises:
        ValueError: `suite` has an empty name.
    """
    names = [name.strip() for name in suite.split(",")]
    if not all(names):
        raise ValueError(
            f"suite={suite!r} has an empty name: use one of {', '.join(SUITES)}, or task names separated by commas."
        )
    return list(dict.fromkeys(task for name in names for task in SUITES.get(name, (name,))))


def check_task_names(tasks: Collection[str], known: Collection[str]) -> None:
    """Raise ValueError for the first of `tasks` that is not in `known`, with the suites and the closest names."""
    for task in tasks:
        if task not in known:
            close = difflib.get_close_matches(task, [*SUITES, *known], n=4)
            hint = f" Closest: {', '.join(close)}." if close else ""
            raise ValueError(
                f"{task!r} is neither a suite ({', '.join(SUITES)}) nor a task of the lm-eval harness.{hint}"
            )

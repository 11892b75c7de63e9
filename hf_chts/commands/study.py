"""hf-chts study: run what is missing of a study, and write its page."""

import signal
import sys
from pathlib import Path

from hf_chts.config_file import INSTALLED_STUDIES, find_study
from hf_chts.machine import check_can_write
from hf_chts.studies.page import write_page
from hf_chts.studies.running import RunsFailed, check, missing, part_of, run_all
from hf_chts.studies.study import Study


def study(
    path: Path, results: Path | None, scratch: Path, *, quick: bool, only: str, rows: list[str], page: bool
) -> None:
    """See `hf-chts study --help`."""
    path = find_study(path)
    loaded = Study.load(path, quick=quick)
    check(loaded)
    name = f"{loaded.name}-quick" if quick else loaded.name
    if results is None:  # a short form is no evidence, so it stays out of the folder of results
        beside = Path("studies") if path.parent.name == INSTALLED_STUDIES else path.parent
        results = scratch / name / "results" if quick else beside / "results" / name
    runs = loaded.runs(scratch / name)
    if rows:
        known = [row.name for row in loaded.rows]
        if unknown := [row for row in rows if row not in known]:
            form = "short form of the study" if quick else "study"
            raise ValueError(f"the {form} has no row {unknown[0]!r}; its rows are {', '.join(known)}")
        runs = [run for run in runs if run.row in rows]
    runs = part_of(runs, only)
    command = f"hf-chts study {path}{' --quick' if quick else ''}"
    check_can_write(results, "the folder of results")
    if not page:
        left = missing(loaded, runs, results)
        print(f"{loaded.name}: {len(left)} of {len(runs)} runs are missing", flush=True)
        before = signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
        )  # the run ends too, as with Ctrl-C
        try:
            run_all(path, loaded, left, results, scratch / name, command, lambda line: print(line, flush=True))
        except RunsFailed:
            write_page(loaded, results)  # of those that did not
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    print(f"{loaded.name}: page {write_page(loaded, results)}", flush=True)

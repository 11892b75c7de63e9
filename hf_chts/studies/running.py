"""Runs of a study: what is missing is run, each in a process of its own, and leaves one JSON file.

Several processes may work at one study: a run that another one is at is left to it.
"""

import dataclasses
import json
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from hf_chts.files.atomic import finite_or_null, write_json
from hf_chts.files.reading import read_json, reading
from hf_chts.machine import check_can_write, device_name, on_cpu, version_of
from hf_chts.studies.memory import memory_mib
from hf_chts.studies.page_results import read_result
from hf_chts.studies.study import Run, Study, as_saved
from hf_chts.studies.tasks import Say, parsed, sparsity_config, task_settings, train

_PACKAGES = ("torch", "transformers", "numba", "numpy", "tokenizers", "sacrebleu")
_ALIKE = 3  # so many failures in a row with the same last line are not those of a single run
_BUSY = 75  # the exit status of a run that another process is at


class RunsFailed(ValueError):
    """Some runs of a study failed."""


def part_of(runs: Sequence[Run], only: str) -> list[Run]:
    """Every n-th run: "17/64" takes the 17th of each 64, and "1/1" all of them.

    Raises:
        ValueError: `only` is not of that form.
    """
    first, _, of = only.partition("/")
    if not (only.isascii() and len(only) < 20 and first.isdecimal() and of.isdecimal() and 1 <= int(first) <= int(of)):
        raise ValueError(f"--only is {only!r}; it must be like 17/64: the part, from 1 to 64, and the number of parts")
    return list(runs)[int(first) - 1 :: int(of)]


def check(study: Study) -> None:
    """Raises ValueError, naming the row, if a run's settings are not those of its task, or there is no such task."""
    settings_of_task = task_settings(study.task)
    for row in study.rows:
        try:
            settings: Any = parsed(settings_of_task, row.settings)
            sparsity_config(getattr(settings, "sparsity", {}), topology_seed=0)
        except ValueError as error:
            raise ValueError(f"row {row.name!r}: {error}") from error


def missing(study: Study, runs: Sequence[Run], results: Path) -> list[Run]:
    """Those of `runs` that have no result yet.

    Raises:
        ValueError: a result is of other settings than the study now has, or its file is damaged or a folder.
    """
    left = []
    for run in runs:
        path = results / f"{run.name}.json"
        if not path.exists():
            left.append(run)
            continue
        if path.is_dir():
            raise ValueError(f"{path} is a folder, and a run's result is to be there: remove it")
        there, now = read_result(path, run)["settings"], as_saved(run.settings)
        if there != now:
            raise ValueError(
                f"{path} was run with other settings ({_changed(there, now)}): remove it to run it "
                "again, or give the row another name"
            )
    return left


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    """What differs, by name, as "epochs 3, now 5, sparsity.method 'set', now 'chts'"."""
    told = []
    for name in sorted({*before, *now}):
        if name in before and name in now and before[name] == now[name]:
            continue
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            told.append(_changed(old, new, f"{prefix}{name}."))
        else:
            values = [repr(values[name]) if name in values else "not set" for values in (before, now)]
            told.append(f"{prefix}{name} {values[0]}, now {values[1]}")
    return ", ".join(told)


def run_all(
    path: Path, study: Study, runs: Sequence[Run], results: Path, scratch: Path, command: str, say: Say
) -> list[Path]:
    """Run each of `runs` in a process of its own, one after another. Returns the result files that are new.

    Args:
        path: the study's YAML.
        command: what repeats a run, for its file.

    Raises:
        RunsFailed: some failed, and the others have been run, unless three in a row failed alike; the message names
            them, and the log of the last one.
        OSError: results or checkpoints cannot be written.
    """
    done: list[Path] = []
    failed: list[str] = []
    reasons: list[str] = []  # of the failures since the last run that did well
    for folder, what in ((results, "the folder of results"), (scratch, "the folder of checkpoints")):
        check_can_write(folder, what)
    results.mkdir(parents=True, exist_ok=True)
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        target = results / f"{run.name}.json"
        try:
            with filelock.FileLock(run.folder / "lock", timeout=0):
                if target.is_file():  # another process has been faster
                    shutil.rmtree(run.folder, ignore_errors=True)
                    continue
                say(f"{study.name} {run.name}: log {run.folder / 'log.txt'}")
                start = time.perf_counter()
                order = {"path": str(path), "quick": study.quick, "run": run.name, "scratch": str(scratch)}
                order |= {"target": str(target), "command": command}
                with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
                    arguments = [sys.executable, "-m", "hf_chts.studies.running", json.dumps(order)]
                    ended = subprocess.run(arguments, stdout=log, stderr=subprocess.STDOUT, check=False)
                if ended.returncode == _BUSY:  # begun by a command that has been killed, and still going on
                    say(f"{study.name} {run.name}: another process is at it, see {run.folder / 'log.txt'}")
                    continue
                if ended.returncode:
                    reasons.append(_reason(ended.returncode, run.folder / "log.txt"))
                    failed.append(f"{run.name}: {reasons[-1]} (log: {run.folder / 'log.txt'})")
                    say(f"{study.name} failed: {failed[-1]}")
                    if len(reasons) >= _ALIKE and len(set(reasons[-_ALIKE:])) == 1:
                        say(f"{study.name}: {_ALIKE} runs failed alike; those after {run.name} are not tried")
                        break
                    continue
                reasons.clear()
                figures = read_result(target)["figures"]
                told = ", ".join(
                    f"{name} {'not finite' if value is None else f'{value:.4g}'}" for name, value in figures.items()
                )
                say(f"{study.name} {run.name}: {told}; {time.perf_counter() - start:.0f} s")
                done.append(target)
        except filelock.Timeout:
            say(f"{study.name} {run.name}: another process is at it, see {run.folder / 'log.txt'}")
            continue
        shutil.rmtree(run.folder, ignore_errors=True)
    if failed:
        names = ", ".join(name.partition(":")[0] for name in failed)
        raise RunsFailed(f"{len(failed)} of {len(runs)} runs failed ({names}); the last one, {failed[-1]}")
    return done


def _reason(status: int, log: Path) -> str:
    """Why a run's process ended with this status."""
    if status < 0:  # what the log ends with says how far it was, not why it ended
        hint = ", perhaps for want of memory" if -status == signal.SIGKILL else ""
        name = f"signal {-status} ({signal.strsignal(-status)}{hint})"
        return f"killed by {name}; the same command goes on from its last checkpoint"
    return " ".join(log.read_text(encoding="utf-8").strip().splitlines()[-1:])


def run_one(study: Study, run: Run, command: str) -> dict[str, Any]:
    """Train one run. Returns what its result file holds.

    Raises:
        ValueError: it was begun with other settings.
    """
    import torch

    begun = run.folder / "settings.json"
    now = as_saved(run.settings)
    if begun.is_file():
        with reading(begun, "Remove its folder to begin the run anew"):
            before = read_json(begun)
        if before != now:
            raise ValueError(
                f"{run.folder} was begun with other settings ({_changed(before, now)}): remove it to begin anew"
            )
    write_json(begun, now)
    settings: Any = parsed(task_settings(study.task), run.settings)
    outcome = train(study.task, run, lambda line: print(line, flush=True))
    device = torch.device("cpu") if on_cpu() else torch.accelerator.current_accelerator()
    assert device is not None
    memory = memory_mib()
    if device.type == "cuda":
        memory["of_device"] = torch.cuda.max_memory_allocated() / 2**20
    return {
        "study": study.name,
        "row": run.row,
        "seed": run.seed,
        "task": study.task,
        "settings": dict(run.settings),
        "all_settings": {**dataclasses.asdict(settings), "sparsity": outcome.sparsity},
        "figures": outcome.figures,
        "seconds": round(outcome.seconds, 1),
        "processor_seconds": round(outcome.processor_seconds, 1),
        "memory_mib": {name: round(value, 1) for name, value in memory.items()},
        "machine": {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "versions": {name: version_of(name) for name in ("hf_chts", *_PACKAGES)},
        },
        "code": {"commit": _commit(), "python": platform.python_version()},
        "command": command,
        "curves": outcome.curves,
    }


def _commit() -> str:
    """The commit of the clone that the package is in, with "+" if it was changed; "" if it is in none."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        told = [
            subprocess.run([*git, *what], capture_output=True, text=True, check=True).stdout.strip()
            for what in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", ".."])
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return told[0] + ("+" if told[1] else "")


def main() -> None:
    """The process of one run."""
    order = json.loads(sys.argv[1])
    study = Study.load(order["path"], quick=order["quick"])
    run = next((run for run in study.runs(Path(order["scratch"])) if run.name == order["run"]), None)
    if run is None:
        sys.exit(f"{order['path']} has no run {order['run']} any more: it was changed after the command began")
    try:
        with filelock.FileLock(run.folder / "training.lock", timeout=0):
            write_json(order["target"], finite_or_null(run_one(study, run, order["command"])))
    except filelock.Timeout:
        sys.exit(_BUSY)
    # as run_all does, which may have been killed: were the run repeated, it would go on from this checkpoint
    shutil.rmtree(run.folder, ignore_errors=True)


if __name__ == "__main__":
    main()

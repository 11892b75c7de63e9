"""Runs the benchmarks of speed and memory and makes docs/performance.md of what they print.

    python benchmarks/performance.py [--only step mlp] [--again] [--minutes 40] [--page]

Every JSON line that a benchmark prints goes into docs/data/performance.jsonl as soon as it is there. A command that has
finished there is not run again (`--again`: it is), so that a run that was broken off goes on where it was. `--page`
runs nothing. The page is benchmarks/performance_notes.md with its tables filled in.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from performance_tables import page

ROOT = Path(__file__).parents[1]
RECORDS, NOTES, PAGE = (
    ROOT / name for name in ("docs/data/performance.jsonl", "benchmarks/performance_notes.md", "docs/performance.md")
)
# A processor with AVX-512 plays one without. MKL listens to its variable on Intel's processors alone
AVX2 = "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 NUMBA_CPU_NAME=haswell "
STEP = "python benchmarks/step.py --device cpu --steps 1 --models "


@dataclass(frozen=True)
class Job:
    group: str  # which table its results are in
    command: str  # as in a shell, variables first
    limit: int  # seconds


ALL = " --ways masked links sparse sparselab csr"
# what matters most is first
JOBS = [
    Job("step", STEP + "llama_1b/1 --tokens 4x256 --sparsity 0.9 0.95" + ALL, 400),
    Job("mlp", "python benchmarks/mlp.py --ways masked links sparse sparselab csr", 150),
    Job("step", STEP + "llama_130m --tokens 4x256 --sparsity 0.9 --repeats 3" + ALL, 300),
    Job("auto", STEP + "llama_1b/1 --tokens 4x256 --sparsity 0.5 0.9 --ways sparse auto", 240),
    Job("auto", STEP + "llama_60m --tokens 1x128 8x256 --sparsity 0.7 0.9 --ways sparse auto --repeats 3", 300),
    Job("update", "python benchmarks/topology_update.py --repeats 3", 240),
    Job("decode", "python benchmarks/decode.py --tokens 8", 400),
    Job("decode", "python benchmarks/decode.py --layers 8 --tokens 8 --sparsity 0.95", 300),
    Job("step avx2", AVX2 + STEP + "llama_1b/1 --tokens 4x256 --sparsity 0.9 0.95 --ways sparse sparselab", 240),
    Job("mlp avx2", AVX2 + "python benchmarks/mlp.py --ways sparse sparselab --optimizers sgd", 60),
    Job("update avx2", AVX2 + "python benchmarks/topology_update.py --methods chts,chtss --repeats 3", 150),
    Job("step", STEP + "llama_60m --tokens 8x256 --sparsity 0.9 --repeats 3" + ALL, 300),
    Job("exponents", "python benchmarks/scaling.py --exponents --ways masked links sparse", 200),
    Job("step", STEP + "llama_1b/1 --tokens 1x128 --sparsity 0.9" + ALL, 90),
    Job("step", STEP + "llama_1b/1 --tokens 4x256 --sparsity 0.8 0.99 --ways sparse sparselab", 240),
    Job("step", STEP + "llama_1b/1 --tokens 4x256 --sparsity 0.9 0.95 --ways links sparse --bf16", 240),
    Job("memory", "python benchmarks/memory.py --models llama_130m llama_1b/1", 240),
    Job("step", STEP + "llama_1b/1 --tokens 16x256 --sparsity 0.9 --ways sparse sparselab --repeats 2", 300),
    Job("step", STEP + "llama_7b/1 --tokens 2x256 --sparsity 0.9 0.95 --ways sparse sparselab --repeats 3", 400),
]


def read() -> list[dict]:
    if not RECORDS.is_file():
        return []
    return [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]


def forget(command: str) -> None:
    """Remove what is there of a command."""
    records = read()
    kept = [json.dumps(record) + "\n" for record in records if record["command"] != command]
    if len(kept) < len(records):
        RECORDS.write_text("".join(kept), encoding="utf-8")


def add(record: dict) -> None:
    RECORDS.parent.mkdir(parents=True, exist_ok=True)
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def run(job: Job) -> int:
    """Run a job and add its results to the records. Returns its exit status, 124 if it ran past its limit."""
    words = shlex.split(job.command)
    first = next(index for index, word in enumerate(words) if "=" not in word)
    variables = dict(word.split("=", 1) for word in words[:first])
    environment = os.environ | variables | {"PYTHONWARNINGS": "ignore"}
    forget(job.command)
    start = time.perf_counter()
    call = [sys.executable, *words[first + 1 :]]
    # its own session: a benchmark's processes end with it
    process = subprocess.Popen(
        call, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, start_new_session=True
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, 9)

    timer = threading.Timer(job.limit, stop)
    timer.start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line[:300].rstrip(), flush=True)
            if line.startswith('{"'):  # the Trainer prints Python's dicts
                add({"group": job.group, "command": job.command, "result": json.loads(line)})
        status = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            stop()
    status = 124 if late.is_set() else status
    add({"group": job.group, "command": job.command, "exit": status, "seconds": round(time.perf_counter() - start)})
    return status


def run_all(jobs: Sequence[Job], minutes: float, again: bool) -> list[str]:
    """Run those that have not finished yet. Returns what went wrong, a line for each."""
    start, wrong = time.perf_counter(), []
    for job in jobs:
        finished = any(record["command"] == job.command and record.get("exit") == 0 for record in read())
        if finished and not again:
            continue
        if time.perf_counter() - start > 60 * minutes:
            wrong.append(f"not run, the time is over: {job.command}")
            continue
        print(f"== {job.command}", flush=True)
        status = run(job)
        if status:
            wrong.append(f"exit status {status}: {job.command}")
        write_page()
    return wrong


def write_page() -> None:
    PAGE.write_text(page(NOTES.read_text(encoding="utf-8"), read()), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = list(dict.fromkeys(job.group for job in JOBS))
    parser.add_argument("--only", nargs="+", metavar="GROUP", choices=groups, help=f"of {', '.join(groups)}")
    parser.add_argument("--again", action="store_true", help="also run what has finished before")
    parser.add_argument("--minutes", type=float, default=40, help="after which no command is begun (default: 40)")
    parser.add_argument("--page", action="store_true", help="only make the page of what is there")
    arguments = parser.parse_args()
    chosen = [job for job in JOBS if arguments.only is None or job.group in arguments.only]
    wrong = [] if arguments.page else run_all(chosen, arguments.minutes, arguments.again)
    write_page()
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

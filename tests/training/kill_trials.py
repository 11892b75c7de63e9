"""Does a run that is killed end as if it had not been?

    python tests/training/kill_trials.py [--trials 20] [--seed 0] [--cases 4]

Each trial starts a tiny run that saves every second step, ends it with SIGKILL at a random moment, resumes it from the
last whole checkpoint, often kills it again, and at last has it finish. Weights, masks, optimizer state and losses must
then be, bit for bit, those of a run that was never interrupted, and each attempt must have gone on from the last
checkpoint whose save was complete. Every other trial goes on until a kill has left a half-written checkpoint behind.
Prints a JSON line per trial and one in all; the exit status is 1 if any trial differs. The seed fixes which moments are
aimed at; where they hit, and how a machine's load shifts them, is left to chance.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
if __name__ == "__main__":  # a test that takes a table from here may go on to start runs on a GPU
    os.environ["DS_ACCELERATOR"] = "cpu"  # an installed DeepSpeed would tell stdout that it found no GPU

import torch
from cases import STEPS

from kill_worker import SAVE_EVERY, load_all, spawn  # isort: skip - beside this file

TRIED = ("chtss, per-weight Adam steps", "rigl, historical weights", "gmp", "chtss")
SEAL = "checkpoint_seal.json"  # by its name: what hf_chts thinks of a checkpoint is not asked here


@dataclass(frozen=True)
class Whole:
    """A run that was not interrupted: what it ended with, and the seconds of its parts."""

    digest: str
    start: float
    step: float
    save: float


class Attempt:
    """A process that trains, told from its lines; ended by SIGKILL `delay` seconds after the line `after`, if given."""

    def __init__(self, directory: Path, case: str, after: str | None = None, delay: float = 0.0) -> None:
        process, pipe = spawn(directory, case)
        self.lines: dict[str, float] = {}  # each with the time when it came
        with os.fdopen(pipe) as told:
            for line in map(str.strip, told):
                self.lines[line] = time.perf_counter()
                if line == after:
                    time.sleep(delay)
                    os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        self.killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        self.last = next(reversed(self.lines), "nothing at all")

    def step(self, kind: str) -> int | None:
        """The step of the last line of a kind."""
        return next((int(line.split()[1]) for line in reversed(self.lines) if line.startswith(f"{kind} ")), None)

    def problem(self, go_on_after: int) -> str | None:
        if self.step("begin") not in (go_on_after, None):
            return f"went on after step {self.step('begin')}, not {go_on_after}"
        if not self.killed and not self.last.startswith("done "):
            return f"ended with {self.last}"
        return None


def uninterrupted(directory: Path, case: str) -> Whole:
    run = Attempt(directory, case)
    assert run.last.startswith("done "), run.last
    at = run.lines
    saves = range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)
    return Whole(
        digest=run.last,
        start=at["begin 0"] - at["started"],
        step=(at[run.last] - at["begin 0"]) / STEPS,
        save=sum(at[f"saved {step}"] - at[f"saving {step}"] for step in saves) / len(saves),
    )


def moment(rng: random.Random, done: int, whole: Whole, in_a_save: bool) -> tuple[str, float]:
    """After which line, and how many seconds later, to kill an attempt that goes on after step `done`."""
    if in_a_save:
        return f"saving {rng.randrange(done + SAVE_EVERY, STEPS + 1, SAVE_EVERY)}", rng.uniform(0, whole.save)
    step = rng.randint(done, STEPS)
    if step == done:
        return "started", rng.uniform(0, whole.start + whole.step)
    return f"step {step}", rng.uniform(0, whole.step)


def trial(directory: Path, case: str, whole: Whole, rng: random.Random, in_a_save: bool) -> dict:
    """Kill, resume, …, finish, compare."""
    kills: list[dict] = []
    wanted, done = rng.choice((1, 1, 2, 3)), 0
    while True:
        aim_at_a_save = in_a_save and done < STEPS and not any(kill["half_written"] for kill in kills)
        finish = len(kills) >= wanted and not aim_at_a_save
        attempt = Attempt(directory, case, *(() if finish else moment(rng, done, whole, aim_at_a_save)))
        problem = attempt.problem(done)
        if problem or finish or not attempt.killed:
            break
        saving, saved = attempt.step("saving"), attempt.step("saved")
        folder = directory / f"checkpoint-{saving}"
        sealed = (folder / SEAL).exists()
        kills.append({"after": attempt.last, "half_written": folder.exists() and not sealed})
        # the seal is a save's last word, also where the line that tells of its end did not come any more
        done = (saving if sealed else saved) or done
    equal = problem is None and attempt.last == whole.digest
    return {"case": case, "kills": kills, "equal": equal, "problem": problem}


def trials(count: int, seed: int, cases: int) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as scratch:
        load_all(Path(scratch) / "loaded")
        tried = TRIED[:cases]
        whole = {case: uninterrupted(Path(scratch) / f"whole-{n}", case) for n, case in enumerate(tried[:count])}
        for number, case in zip(range(count), itertools.cycle(tried)):
            in_a_save = (number // len(tried) + number % len(tried)) % 2 == 0  # each case comes to both
            for again in range(5):
                directory = Path(scratch) / f"{number}-{again}"
                result = trial(directory, case, whole[case], random.Random(f"{seed} {number} {again}"), in_a_save)
                shutil.rmtree(directory, ignore_errors=True)
                # a run may finish before it is hit where it should be
                if not result["equal"] or any(kill["half_written"] or not in_a_save for kill in result["kills"]):
                    break
            yield {"trial": number, **result}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=len(TRIED), help=f"how many of {', '.join(TRIED)}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for result in trials(args.trials, args.seed, args.cases):
        results.append(result)
        print(json.dumps(result), flush=True)
    kills = [kill for result in results for kill in result["kills"]]
    figures = {
        "trials": len(results),
        "equal": sum(result["equal"] for result in results),
        "kills": len(kills),
        "during_a_save": sum(kill["after"].startswith("saving ") for kill in kills),
        "half_written": sum(kill["half_written"] for kill in kills),
    }
    print(json.dumps(figures))
    return figures["equal"] != figures["trials"]


if __name__ == "__main__":
    sys.exit(main())

"""Every way to end a run, at every stage of it: what is left, what is said, and whether the run goes on as it was.

    python tests/training/endings.py

A child process trains a tiny run and is ended where the table says, or by a timer during its saves; another one resumes
what is left. Prints a JSON line for each case. A full disk is a real one (a small tmpfs) where this is started with
`unshare --map-root-user --mount`, and is also played, with the errors that Python, safetensors and torch raise.
"""

import errno
import functools
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
if __name__ == "__main__":  # a test that takes a table from here may go on to start runs on a GPU
    os.environ["DS_ACCELERATOR"] = "cpu"  # an installed DeepSpeed would tell stdout that it found no GPU

import torch
import transformers
from cases import trainer
from safetensors import SafetensorError
from tiny import tiny_llama
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import CallbackHandler

from hf_chts.checkpoint import seal as checkpoint_seal
from hf_chts.checkpoint import topology_state
from hf_chts.evolution import update_ranks
from hf_chts.evolution.regrown_adam import RegrownAdam
from hf_chts.records import run_record, snapshots
from hf_chts.training import run_start
from hf_chts.training import trainer as sparse_trainer

CASE, STEPS, SAVE_EVERY, TIME_LIMIT = "chtss, per-weight Adam steps", 14, 4, 120

# stage: what is called then and where it is looked up, at which of its calls it ends, the last whole checkpoint by then
STAGES = {
    "as the folder is taken": (run_start, "claim_folder", 1, 0),
    "as training begins": (CallbackHandler, "on_train_begin", 1, 0),
    "in a forward": (Trainer, "compute_loss", 6, 4),
    "before an optimizer step": (CallbackHandler, "on_pre_optimizer_step", 7, 4),
    "in an update, some layers changed": (RegrownAdam, "changed", 11, 4),  # 7 layers: of the second, at step 8
    "after an update": (update_ranks, "overall_figures", 2, 4),
    "in a record": (run_record, "_append", 3, 4),
    "as a snapshot is written": (snapshots, "write_whole", 3, 4),
    "as a save begins": (sparse_trainer, "save_topology", 2, 4),
    "at the masks of a save": (topology_state, "save_masks", 2, 4),
    "at the weights of a save": (transformers.modeling_utils, "safe_save_file", 2, 4),
    "at the optimizer of a save": (Trainer, "_save_optimizer_and_scheduler", 2, 4),
    "at the random numbers of a save": (Trainer, "_save_rng_state", 2, 4),
    "at the state of a save": (TrainerState, "save_to_json", 2, 4),
    "before the seal": (sparse_trainer, "seal", 2, 4),
    "as the seal is written": (checkpoint_seal, "write_json", 2, 4),
    "after the seal, before an older one goes": (sparse_trainer, "rotate_checkpoints", 2, 8),
    "after the last step": (CallbackHandler, "on_train_end", 1, 14),
}
SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
# nothing handles SIGTERM here, so that it ends a process as SIGKILL does
SIGNALLED = [(way, stage) for stage in STAGES for way in ("SIGINT", "SIGKILL")] + [("SIGTERM", "before the seal")]
# seconds after the begin of its second save at which a run is killed, resumed, and killed again
KILLED_IN_SAVES = [(0.002, 0.03), (0.01, 0.05), (0.02, 0.002), (0.08, 0.01)]
SEAL = "checkpoint_seal.json"  # by its name: hf_chts is not asked here which checkpoints are complete
# what is raised where a disk is full, by the file whose write finds it so: as Python, safetensors and torch do
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FULL_SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
FULL_TORCH = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
FULL_AT_STAGE = {
    "as the folder is taken": FULL,
    "as a save begins": FULL,
    "at the masks of a save": FULL_SAFETENSORS,
    "at the weights of a save": FULL_SAFETENSORS,
    "at the optimizer of a save": FULL_TORCH,
    "at the random numbers of a save": RuntimeError("basic_ios::clear: iostream error"),
    "at the state of a save": FULL,
    "before the seal": FULL,
    "as the seal is written": FULL,
}
# what becomes NaN, in or after which step, and the last whole checkpoint by then
NAN = {
    "the loss": (6, 4),
    "the gradient": (7, 4),
    "the gradient, in the step of an update and a save": (8, 4),
    "a weight, before a save": (8, 4),
    "a moment, before a save": (8, 4),
    "the gradient, in the last step": (14, 12),
}


class Spoil(TrainerCallback):
    """Makes something NaN: a loss and a gradient before they are looked at, a weight and a moment after the step."""

    def __init__(self, stage):
        self.stage, (self.step, _) = stage, NAN[stage]

    def spoilt_step(self, inner):
        def training_step(run, *args, **kwargs):
            loss = inner(run, *args, **kwargs)
            if run.state.global_step + 1 != self.step:
                return loss
            if "gradient" in self.stage:
                run.model.model.norm.weight.grad[0] = torch.nan
            return loss * torch.nan if "loss" in self.stage else loss

        return training_step

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == self.step and "before a save" in self.stage:
            norm = model.model.norm.weight
            spoilt = norm.data if "weight" in self.stage else optimizer.state[norm]["exp_avg"]
            spoilt[0] = torch.nan


class BeginsAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_train_begin(self, args, state, control, **kwargs):
        assert state.global_step == self.step, f"went on after step {state.global_step}, not {self.step}"


def left_in(directory):
    """The step of the last complete checkpoint, or 0."""
    return max(
        (int(path.parent.name.split("-")[1]) for path in Path(directory).glob(f"checkpoint-*/{SEAL}")), default=0
    )


def go_on(directory, callbacks=()):
    """Train to the end, from the last complete checkpoint if there is one; a digest of all that the run comes to."""
    left = left_in(directory)
    # a resumed model starts with other weights than the run did: all has to come from the checkpoint
    model = tiny_llama(seed=5 if left else 0, num_hidden_layers=1)
    settings = {"max_steps": STEPS, "save_steps": SAVE_EVERY, "save_total_limit": 1}
    run = trainer(directory, CASE, [BeginsAfter(left)], model, **settings)
    for callback in callbacks:
        run.add_callback(callback)
    run.train(resume_from_checkpoint=left > 0)
    assert run.state.global_step == STEPS
    return digest(run)


def digest(run):
    """SHA-256 of weights, masks, what else is kept of the topology, optimizer state and losses at a run's end."""
    topology = run.evolver.state(run.state.global_step)
    tensors = {f"weight {name}": tensor for name, tensor in run.model.state_dict().items()}
    for kind in ("masks", "explored", "stored", "born"):
        tensors |= {f"{kind} {name}": tensor for name, tensor in getattr(topology, kind).items()}
    for number, moments in run.optimizer.state_dict()["state"].items():
        tensors |= {f"{kind} {number}": torch.as_tensor(value) for kind, value in moments.items()}
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    total.update(repr([entry["loss"] for entry in run.state.log_history if "loss" in entry]).encode())
    return total.hexdigest()


def ended_at(stage, end):
    """Has `end` called at a stage, before what happens there, in the midst of it where that is a line of a record."""
    owner, name, at, _ = STAGES[stage]
    inner, calls = getattr(owner, name), [0]

    @functools.wraps(inner)
    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == at:
            if stage == "in a record":
                with open(args[0], "a") as file:
                    file.write('{"step":8,"li')
            end()
        return inner(*args, **kwargs)

    return mock.patch.object(owner, name, counted)


def train(directory, stage, end):
    with ended_at(stage, end):
        return go_on(directory)


def train_spoilt(directory, stage):
    spoil = Spoil(stage)
    with mock.patch.object(Trainer, "training_step", spoil.spoilt_step(Trainer.training_step)):
        go_on(directory, [spoil])


def in_child(work, *args):
    """What a function returns in a forked process, or how that ended."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        try:
            # whoever starts the tests in the background may have them ignore SIGINT, and a child would do so too
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.alarm(TIME_LIMIT)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            result = {"result": work(*args)}
        except BaseException as error:  # a child must not go on with what its parent was doing
            result = {"error": type(error).__name__, "said": str(error), "where": traceback.format_exc()}
        os.write(writing, json.dumps(result).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(process, 0)
    return json.loads(told) if told else {"signal": signal.Signals(os.WTERMSIG(status)).name}


def ending(directory, way, stage):
    if way == "NaN":
        ended = in_child(train_spoilt, directory, stage)
        return {"ended": ended, "left": left_in(directory), "again": in_child(go_on, directory)}

    def by_signal():
        os.kill(os.getpid(), SIGNALS[way])

    def by_error():
        raise FULL_AT_STAGE[stage]

    ended = in_child(train, directory, stage, by_signal if way in SIGNALS else by_error)
    return {"ended": ended, "left": left_in(directory), "again": in_child(go_on, directory)}


def killed_in_saves(directory, delays):
    half_written = []
    for delay in delays:
        # a timer of the system's, which ends the process as SIGKILL does
        in_child(train, directory, "as a save begins", functools.partial(signal.setitimer, signal.ITIMER_REAL, delay))
        half_written += [path.name for path in directory.glob("checkpoint-*") if not (path / SEAL).exists()]
    return {"half_written": half_written, "again": in_child(go_on, directory)}


def on_full_disk(mount, kilobytes):
    """A run on a disk of that size; what it said; and the run again when there is room."""
    directory = mount / "run"
    try:
        go_on(directory)
        return {"ended": None}
    except Exception as error:
        ended = {"error": type(error).__name__, "said": str(error)}
    left = left_in(directory)
    subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
    return {"ended": ended, "left": left, "again": {"result": go_on(directory)}}


def full_disks(scratch, whole):
    """Disks that are full at other files each: of the first save, and of the second beside the first."""
    mount = Path(scratch) / "disk"
    mount.mkdir()
    for kilobytes in (24, *range(120, 1000, 120)):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(mount)]).returncode:
            return
        try:
            told = in_child(on_full_disk, mount, kilobytes)
            result = told.get("result", told)
        finally:
            subprocess.run(["umount", str(mount)], check=True)
        if result.get("ended", told) is None:  # large enough for all of it
            return
        yield {"way": "a full disk", "stage": f"{kilobytes} kB", **result, "whole": whole}


def cases():
    yield from (("", way, stage) for way, stage in SIGNALLED)
    yield from (("", "NaN", stage) for stage in NAN)
    yield from (("played ", "full disk", stage) for stage in FULL_AT_STAGE)


def main():
    # nothing is computed in this process: one with threads of torch's cannot be forked
    torch.set_num_threads(1)
    # tqdm's own lock is shared by forked processes, and one that is killed while it writes a bar would hold it for ever
    tqdm.set_lock(threading.RLock())
    with tempfile.TemporaryDirectory() as scratch:
        trainer(Path(scratch) / "loaded", save_strategy="no").save_model()  # loads what the forked processes need
        gc.collect()
        gc.freeze()  # or every collection in a child copies all of it
        whole = in_child(go_on, Path(scratch) / "whole")["result"]
        for number, (played, way, stage) in enumerate(cases()):
            result = ending(Path(scratch) / str(number), way, stage)
            print(json.dumps({"way": played + way, "stage": stage, **result, "whole": whole}), flush=True)
        for number, delays in enumerate(KILLED_IN_SAVES):
            result = killed_in_saves(Path(scratch) / f"killed {number}", delays)
            print(json.dumps({"way": "killed in saves", "stage": number, **result, "whole": whole}), flush=True)
        if "--disks" in sys.argv:
            for result in full_disks(scratch, whole):
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

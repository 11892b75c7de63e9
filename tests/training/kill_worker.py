"""One attempt at a tiny run, in a process that may be killed at any moment; it tells through a pipe how far it is.

Lines: `started`, `begin N` (training starts after step N), `step N`, `saving N`, `saved N`, and as the last
`done DIGEST` or `failed TRACEBACK`.
"""

import gc
import hashlib
import os
import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from cases import STEPS, trainer
from tiny import tiny_llama
from tqdm import tqdm
from transformers import TrainerCallback

from hf_chts.checkpoint.run_folder import last_sealed

SAVE_EVERY = 2
TIME_LIMIT = 120  # seconds; an attempt that hangs ends with SIGALRM


def load_all(directory: Path) -> None:
    """Have this process load what a run needs, so that those that it forks need not."""
    # tqdm's own lock is shared by forked processes, and one that is killed while it writes a bar would hold it for ever
    tqdm.set_lock(threading.RLock())
    # nothing is computed here: a process with threads of torch's cannot be forked
    trainer(directory, save_strategy="no").save_model()
    gc.collect()
    gc.freeze()  # or every collection in a child copies all of it


def spawn(directory: Path, case: str) -> tuple[int, int]:
    """Fork a process for an attempt: its id, and the end of the pipe to read from."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    # whatever happens, the child must not go on with what its parent was doing
    try:
        signal.alarm(TIME_LIMIT)
        log = os.open(f"{directory}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        attempt(directory, case, lambda line: os.write(writing, f"{line}\n".encode()))
    except BaseException:
        os.write(writing, f"failed {traceback.format_exc()!r}\n".encode())
    finally:
        os._exit(0)


def attempt(directory: Path, case: str, tell: Callable[[str], object]) -> None:
    """Resume from the last whole checkpoint, or start anew if there is none, and train to the end."""
    tell("started")
    resume = last_sealed(directory) is not None
    # what a resumed model starts with is not what the run started with: all has to come from the checkpoint
    model = tiny_llama(seed=5 if resume else 0)
    run = trainer(directory, case, [Told(tell)], model, save_steps=SAVE_EVERY, save_total_limit=2)
    save = run._save_checkpoint

    def save_checkpoint(*args, **kwargs):
        step = run.state.global_step
        tell(f"saving {step}")
        save(*args, **kwargs)
        tell(f"saved {step}")

    run._save_checkpoint = save_checkpoint
    run.train(resume_from_checkpoint=resume or None)
    assert run.state.global_step == STEPS, f"{run.state.global_step} steps were trained, not {STEPS}"
    tell(f"done {digest(run)}")


class Told(TrainerCallback):
    def __init__(self, tell):
        self.tell = tell

    def on_train_begin(self, args, state, control, **kwargs):
        self.tell(f"begin {state.global_step}")

    def on_step_end(self, args, state, control, **kwargs):
        self.tell(f"step {state.global_step}")


def digest(run) -> str:
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

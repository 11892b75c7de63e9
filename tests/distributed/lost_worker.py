"""One of two ranks that train; the second is killed in step 6."""

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import trainer

torch.set_num_threads(1)
run = trainer(sys.argv[1], save_steps=4, ddp_timeout=60)
assert run.args.world_size == 2, f"{run.args.world_size} ranks: this test needs two"
step = run.training_step


def killed_in_step_6(*args, **kwargs):
    if run.state.global_step == 5 and run.args.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args, **kwargs)


run.training_step = killed_in_step_6
run.train()

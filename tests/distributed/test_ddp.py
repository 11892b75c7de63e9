"""Real DDP processes on the CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, trainer
from tiny import tiny_llama
from transformers import TrainerCallback

from hf_chts.checkpoint import load_masks

from ddp_worker import STEPS, one_update  # isort: skip - beside this file
from launching import accelerate  # isort: skip

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Every case, trained, resumed and checked at each step by two ranks; the masks of an update of given weights."""
    directory = tmp_path_factory.mktemp("ddp")
    command = [
        str(Path(sys.executable).parent / "accelerate"), "launch",
        "--config_file", str(ROOT / "configs/accelerate/cpu_ddp.yaml"), "--main_process_port", "0",
        str(HERE / "ddp_worker.py"), str(directory),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return directory


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_evolve_as_one(two_ranks, case):
    one, two = one_update(case), torch.load(two_ranks / "masks.pt")[case]
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["chtss", "rigl, historical weights", "chtss, per-weight Adam steps"])
def test_what_two_ranks_saved_one_process_resumes(two_ranks, tmp_path, case):
    checkpoint = two_ranks / str(list(CASES).index(case)) / "checkpoint-6"
    masks = load_masks(checkpoint).masks
    run = trainer(tmp_path, case, model=tiny_llama(seed=5), max_steps=STEPS, save_steps=6)
    run.add_callback(AtStart(run, masks))
    run.train(resume_from_checkpoint=str(checkpoint))
    assert [entry["step"] for entry in run.evolver.history] == [4, 8]
    run.sparse.check()


class AtStart(TrainerCallback):
    def __init__(self, run, masks):
        self.run, self.masks = run, masks

    def on_train_begin(self, args, state, control, **kwargs):
        assert state.global_step == 6
        assert all(mask.equal(self.masks[name]) for name, mask in self.run.sparse.masks().items())


@pytest.mark.distributed
def test_a_rank_that_lost_the_others_says_so(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(2):  # without a launcher, which would end the other rank before it can speak
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, str(HERE / "lost_worker.py"), str(tmp_path)]
        ranks.append(
            subprocess.Popen(
                command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        )
    said = [process.communicate(timeout=200)[1] for process in ranks]
    assert ranks[1].returncode == -9
    assert ranks[0].returncode == 1
    assert "RuntimeError: rank 0 of 2 lost the others in step 6" in said[0], said[0][-3000:]
    assert f"The last whole checkpoint is {tmp_path}/checkpoint-4" in said[0]


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_differ_are_all_refused_before_they_train(tmp_path):
    accelerate("cpu_ddp", "differing_worker.py", str(tmp_path))

"""Real DDP processes on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES

from ddp_worker import one_update  # isort: skip - beside this file

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
    return torch.load(directory / "masks.pt")


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_evolve_as_one(two_ranks, case):
    one, two = one_update(case), two_ranks[case]
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)

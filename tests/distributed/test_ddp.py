"""Real DDP processes on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddp_worker import one_update  # isort: skip - beside this file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["set", "rigl", "gmp", "chtss"])
def test_two_ranks(tmp_path, method):
    command = [
        str(Path(sys.executable).parent / "accelerate"), "launch",
        "--config_file", str(ROOT / "configs/accelerate/cpu_ddp.yaml"), "--main_process_port", "0",
        str(HERE / "ddp_worker.py"), method, str(tmp_path),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    one = one_update(method)
    two = torch.load(tmp_path / "masks.pt")
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)

"""Two processes that torch.distributed takes for ranks, without a launcher to wait for."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_two_ranks(script, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    tests = Path(__file__).parents[1]
    shared |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    shared |= {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(error[-4000:] for error in errors)

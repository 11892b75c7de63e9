"""Starting the ranks of a worker script."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BIN = Path(sys.executable).parent


def torchrun(ranks, worker, *arguments):
    command = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(ranks)]
    return launch([*command, str(HERE / worker), *arguments])


def accelerate(config, worker, *arguments, ranks=2):
    return launch([
        str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / f"configs/accelerate/{config}.yaml"),
        "--num_processes", str(ranks), "--main_process_port", "0", str(HERE / worker), *arguments,
    ])  # fmt: skip


def launch(command):
    # for DeepSpeed: the CPU even where there is a GPU; its launcher looks for accelerate on the path
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-8000:]
    return result.stdout

"""What only a GPU can show. Nothing here runs where there is none."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, Invariants, losses, same_weights, trainer, weights

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("case", CASES)
def test_invariants_repetition_and_resume(case, bf16, tmp_path):
    settings = {"use_cpu": False, "bf16": bf16}
    runs = []
    for name in ("first", "second"):
        run = trainer(tmp_path / name, case, **settings)
        assert {layer.mask.device.type for layer in run.sparse.layers.values()} == {"cuda"}
        watch = Invariants.watch(run)
        run.train()
        assert watch.updates > 0
        runs.append(run)
    first, second = runs
    assert losses(first) == losses(second)
    assert same_weights(weights(first), weights(second))
    resumed = trainer(tmp_path / "first", case, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-10"))
    assert same_weights(weights(first), weights(resumed))
    for name, mask in first.sparse.masks().items():
        assert mask.equal(resumed.sparse.masks()[name]), name


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["single_gpu", "ddp", "fsdp2", "zero2", "zero3"])
def test_the_run_script_on_every_engine_with_one_process(engine, tmp_path):
    config = ROOT / "configs" / "accelerate" / f"{engine}.yaml"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "1",
        "train_llama.py", "--output_dir", str(tmp_path), "--use_cpu", "false", "--max_steps", "8",
        "--update_interval", "2", "--update_warmup_steps", "0", "--per_device_train_batch_size", "2",
        "--gradient_accumulation_steps", "1", "--save_steps", "4", "--max_eval_tokens", "2000",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "export" / "model.safetensors").is_file()

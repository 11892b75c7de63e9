"""The paper's recipe on a folder laid out as OpenWebText is on the Hub: two ranks, stopped, resumed, ended."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def train(*options):
    binaries = Path(sys.executable).parent
    command = [
        str(binaries / "accelerate"), "launch", "--config_file", str(ROOT / "configs/accelerate/cpu_ddp.yaml"),
        "--main_process_port", "0", str(ROOT / "train_llama.py"), "--config", str(ROOT / "configs/llama_60m.yaml"),
        "--method", "chtss", *map(str, options),
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.distributed
@pytest.mark.slow
def test_stopped_and_resumed_on_two_ranks(tmp_path, letters):
    letters.save_pretrained(tmp_path / "letters")
    settings = json.loads((ROOT / "configs/models/llama_60m.json").read_text())
    settings |= {"hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 2, "vocab_size": 257}
    (tmp_path / "tiny.json").write_text(json.dumps(settings))
    (tmp_path / "owt/plain_text").mkdir(parents=True)
    for file, count in enumerate((60, 5, 110)):  # documents are about 300 tokens
        texts = ["".join(f"line {file + line} of {row}\n" for line in range(40)) for row in range(count)]
        table = pa.table({"text": texts})
        pq.write_table(table, tmp_path / f"owt/plain_text/train-{file:05}-of-00003.parquet", row_group_size=16)
    options = [
        "--model", tmp_path / "tiny.json", "--dataset", tmp_path / "owt", "--tokenizer", tmp_path / "letters",
        # for the CPU, and short
        "--max_steps", 8, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1,
        "--per_device_eval_batch_size", 4, "--bf16", "false", "--use_cpu", "true", "--block_size", 32,
        "--max_eval_tokens", 640, "--update_interval", 3, "--warmup_steps", 4, "--update_warmup_steps", 2,
        "--save_steps", 4, "--eval_strategy", "no", "--logging_steps", 1, "--dataloader_num_workers", 2,
        "--shuffle_buffer", 10,
    ]  # fmt: skip
    train(*options, "--output_dir", tmp_path / "unbroken")
    # what a run that was stopped after step 4 leaves
    shutil.copytree(tmp_path / "unbroken/checkpoint-4", tmp_path / "stopped/checkpoint-4")
    train(*options, "--output_dir", tmp_path / "stopped", "--resume_from_checkpoint", "true")

    unbroken, stopped = (tmp_path / run / "checkpoint-8" for run in ("unbroken", "stopped"))
    weights, again = (load_file(run / "model.safetensors") for run in (unbroken, stopped))
    assert all(weights[name].equal(again[name]) for name in weights)
    for name in ("data_state_0.json", "data_state_1.json"):
        assert (unbroken / name).read_text() == (stopped / name).read_text()
        assert (stopped / name).read_text() != (tmp_path / "stopped/checkpoint-4" / name).read_text()
    losses, losses_again = (
        {entry["step"]: entry["loss"] for entry in json.loads(path.read_text())["log_history"] if "loss" in entry}
        for path in (unbroken / "trainer_state.json", stopped / "trainer_state.json")
    )
    assert losses == losses_again
    assert sorted(losses) == list(range(1, 9))
    results = [json.loads((tmp_path / run / "eval_results.json").read_text()) for run in ("unbroken", "stopped")]
    assert results[0]["eval_loss"] == results[1]["eval_loss"]

"""The run script, end to end as a user starts it, with a model that trains in seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_chts.checkpoint import load_masks

ROOT = Path(__file__).parents[1]
LAUNCH = [str(Path(sys.executable).parent / "accelerate"), "launch"]


def run(launcher, *options):
    return subprocess.run(
        [*launcher, str(ROOT / "train_llama.py"), *map(str, options)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.slow
def test_train_export_and_resume(tmp_path):
    model = tmp_path / "tiny.json"
    settings = json.loads((ROOT / "configs/models/llama_demo.json").read_text())
    settings |= {"hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 2, "vocab_size": 512}
    model.write_text(json.dumps(settings))
    text = tmp_path / "text"
    text.mkdir()
    for n in range(40):
        (text / f"{n}.txt").write_text("".join(f"line {n + i} of file {n}\n" for i in range(60)))
    options = [
        "--model", model, "--dataset", text, "--block_size", 32, "--max_steps", 16, "--update_interval", 4,
        "--save_steps", 8, "--eval_strategy", "no", "--per_device_train_batch_size", 4, "--logging_steps", 4,
        "--output_dir", tmp_path / "run", "--warmup_steps", 2, "--validation_fraction", 0.2,
    ]  # fmt: skip
    result = run(LAUNCH, *options)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "sparsity 90.0000%" in result.stdout
    lines = [line for line in result.stdout.splitlines() if str(tmp_path) not in line]  # the paths of this test
    assert max(map(len, lines)) <= 100, max(lines, key=len)
    assert [line.split()[0] for line in lines if " sparse  −" in line] == ["4", "8"]
    export = tmp_path / "run/export"
    loaded = AutoModelForCausalLM.from_pretrained(export)
    assert len(AutoTokenizer.from_pretrained(export)) == 512
    for name, mask in load_masks(export).masks.items():
        weight = loaded.get_parameter(f"{name}.weight")
        assert int(mask.sum()) == round(0.1 * mask.numel())
        assert weight[~mask].eq(0).all()
    assert (tmp_path / "run/training.png").stat().st_size > 10_000
    assert "<h1" in (tmp_path / "run/report.html").read_text()
    first = json.loads((tmp_path / "run/eval_results.json").read_text())
    assert 0 < first["eval_bits_per_byte"] < 9

    result = run(LAUNCH, *options, "--resume_from_checkpoint", tmp_path / "run/checkpoint-8")
    assert result.returncode == 0, result.stderr[-4000:]
    again = json.loads((tmp_path / "run/eval_results.json").read_text())
    assert again["eval_bits_per_byte"] == first["eval_bits_per_byte"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "1.5"], "sparsity is 1.5"),
        (["--dataset", "nowhere/at/all.txt"], "nowhere/at/all.txt"),
        (["--update_interval", "500"], "update_interval is 500 steps"),
        (["--model", "missing.json"], "model 'missing.json': there is no such config file"),
    ],
)
def test_bad_input_is_one_line(tmp_path, options, message):
    result = run([sys.executable], "--output_dir", tmp_path / "run", *options)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("train_llama.py: ")
    assert message in result.stderr

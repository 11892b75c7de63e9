"""A run of two ranks that pushes: rank 0 alone does, and the export is what the repository holds at the end."""

import json
import os
import subprocess

import pytest
from huggingface_hub import ModelCard
from launching import BIN, ROOT, torchrun

from hf_chts import SparsityHandle, load_sparse
from hf_chts.checkpoint.seal import verify_seal


@pytest.fixture
def options(tmp_path):
    """Of a run of train_llama.py that is over in seconds."""
    model = tmp_path / "tiny.json"
    settings = json.loads((ROOT / "configs/models/llama_demo.json").read_text())
    settings |= {"hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
    model.write_text(json.dumps(settings | {"num_key_value_heads": 2, "vocab_size": 300}))
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {n} of a small corpus\n" * 3}) + "\n" for n in range(200)))
    return [
        "--model", str(model), "--dataset", str(text), "--validation_fraction", "0.1", "--block_size", "16",
        "--max_steps", "8", "--update_interval", "2", "--update_warmup_steps", "1", "--save_steps", "4",
        "--eval_strategy", "no", "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "run"),
        "--warmup_steps", "1",
        "--use_cpu", "true", "--push_to_hub", "true", "--hub_model_id", "me/run", "--hub_strategy", "checkpoint",
        "--hub_always_push", "true",
    ]  # fmt: skip


@pytest.mark.distributed
@pytest.mark.slow
def test_a_refusal_ends_all_ranks(hub, options, tmp_path):
    command = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", str(ROOT / "train_llama.py"), *options]
    environment = hub.environment(tmp_path / "home", token="hf_expired")
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    assert result.returncode == 1
    assert result.stderr.count("train_llama.py: me/run cannot be pushed to:") == 2
    assert "lost the others" not in result.stderr
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_of_train_llama(hub, options, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    for name, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    torchrun(2, str(ROOT / "train_llama.py"), *options)
    assert hub.count("POST /api/repos/create") == 2  # before training, and for the export; by one rank
    progress = [f"Training in progress, step {step}" for step in (4, 8)]
    assert hub.messages("me/run") == [*progress, "End of training"]
    files = hub.files("me/run")
    for name, content in files.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
    for path in (tmp_path / "run/export").rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert files[path.relative_to(tmp_path / "run/export").as_posix()] == path.read_bytes()
    sparse = SparsityHandle.of(load_sparse(tmp_path / "pulled"))
    assert sparse.sparsity() == pytest.approx(0.9, abs=1e-3)
    verify_seal(tmp_path / "pulled/last-checkpoint")
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {
        path.name for path in (tmp_path / "pulled/last-checkpoint").iterdir()
    }
    card = ModelCard(files["README.md"].decode())
    assert {result.metric_type for result in card.data.eval_results} == {"loss", "perplexity", "bits_per_byte"}
    assert "![training](figures/training.png)" in card.text
    assert card.data.datasets is None  # a local file

"""An export runs under the harness's own command, which knows nothing of hf_chts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_llama

from hf_chts import SparsityConfig, export_sparse, sparsify
from hf_chts.data.embedded import train_byte_level_bpe


@pytest.mark.slow
def test_lm_eval_on_an_export(tmp_path):
    model = tiny_llama(vocab_size=257)
    sparsify(model, SparsityConfig())
    export_sparse(model, tmp_path / "export", tokenizer=train_byte_level_bpe([""], 257))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "documents.jsonl").write_text("".join(json.dumps({"text": f"x = {n}\n" * 3}) + "\n" for n in range(4)))
    (tasks / "lines.yaml").write_text(
        f"task: lines\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tasks}/documents.jsonl\n"
        "output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    # the module, in a process where hf_chts cannot be imported
    script = "import sys; sys.modules['hf_chts'] = None; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    command = [
        sys.executable, "-c", script, "--model", "hf", "--model_args", f"pretrained={tmp_path / 'export'}",
        "--tasks", "lines", "--include_path", str(tasks), "--device", "cpu", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    (saved,) = Path(tmp_path / "out").rglob("results*.json")
    scores = json.loads(saved.read_text())["results"]["lines"]
    # an untrained model with 257 tokens, one for each byte: about log2(257) bits for each
    assert 7.5 < scores["bits_per_byte,none"] < 8.5

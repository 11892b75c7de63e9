"""The paper's recipe on a folder laid out as OpenWebText is on the Hub: two ranks, a run and its resumption."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from quick import draw_nothing
from safetensors.torch import load_file
from two_ranks import run_two_ranks

from hf_chts.commands import end_rank
from hf_chts.commands.train import train

ROOT = Path(__file__).parents[2]


@pytest.mark.distributed
@pytest.mark.slow
def test_resumed_on_two_ranks(tmp_path, letters):
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
        "--config", ROOT / "configs/llama_60m.yaml", "--method", "chtss",
        "--model", tmp_path / "tiny.json", "--dataset", tmp_path / "owt", "--tokenizer", tmp_path / "letters",
        # for the CPU, and short
        "--max_steps", 8, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1,
        "--per_device_eval_batch_size", 4, "--bf16", "false", "--use_cpu", "true", "--block_size", 32,
        "--max_eval_tokens", 640, "--update_interval", 3, "--warmup_steps", 4, "--update_warmup_steps", 2,
        "--save_steps", 4, "--eval_strategy", "no", "--logging_steps", 1, "--dataloader_num_workers", 2,
        "--shuffle_buffer", 10,
    ]  # fmt: skip
    run_two_ranks(__file__, tmp_path, *options)

    unbroken, resumed = (tmp_path / run / "checkpoint-8" for run in ("unbroken", "resumed"))
    weights, again = (load_file(run / "model.safetensors") for run in (unbroken, resumed))
    assert all(weights[name].equal(again[name]) for name in weights)
    for name in ("data_state_0.json", "data_state_1.json"):
        assert (unbroken / name).read_text() == (resumed / name).read_text()
        assert (unbroken / name).read_text() != (tmp_path / "unbroken/checkpoint-4" / name).read_text()
    losses, losses_again = (
        {entry["step"]: entry["loss"] for entry in json.loads(path.read_text())["log_history"] if "loss" in entry}
        for path in (unbroken / "trainer_state.json", resumed / "trainer_state.json")
    )
    assert losses == losses_again
    assert sorted(losses) == list(range(1, 9))
    results = [json.loads((tmp_path / run / "eval_results.json").read_text()) for run in ("unbroken", "resumed")]
    assert results[0]["eval_loss"] == results[1]["eval_loss"]


if __name__ == "__main__":  # both runs in one process of each rank, which takes half as long
    folder, *options = sys.argv[1:]
    draw_nothing(pytest.MonkeyPatch())
    end, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # the second run needs the group too
    for name, more in (("unbroken", []), ("resumed", ["--resume_from_checkpoint", f"{folder}/unbroken/checkpoint-4"])):
        train([*options, "--output_dir", f"{folder}/{name}", *more], program="train_llama.py")
    end()
    end_rank()

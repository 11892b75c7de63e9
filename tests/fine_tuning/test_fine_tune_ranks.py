"""`fine-tune` on two ranks: the same links, and adapters that are merged as in one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from hf_chts import SparsityConfig, export_sparse, sparsify
from hf_chts.data.embedded import embedded_tokenizer

pytest.importorskip("trl")
ROOT = Path(__file__).parents[2]


@pytest.mark.distributed
@pytest.mark.parametrize("options", [[], ["--lora_rank", "4"]], ids=["links", "adapters"])
def test_two_ranks(tmp_path, options):
    source, data = tmp_path / "source", tmp_path / "pairs.jsonl"
    model = tiny_llama(vocab_size=300)
    sparsify(model, SparsityConfig(method="set", sparsity=0.8, storage="links"))
    export_sparse(model, source, tokenizer=embedded_tokenizer(300))
    # a step has all rows that are not held out, whatever their order
    data.write_text("\n".join(json.dumps({"prompt": f"{n:02}:", "completion": f"{99 - n:02}"}) for n in range(17)))
    trained = {}
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        command = [
            str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", str(ranks),
            "-m", "hf_chts", "fine-tune", "--model", str(source), "--dataset", str(data), "--output_dir", str(output),
            "--max_steps", "6", "--per_device_train_batch_size", str(16 // ranks), "--learning_rate", "0.1",
            "--optim", "sgd",
            "--use_cpu", "true", "--save_strategy", "no", *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert not done.returncode, done.stdout[-3000:] + done.stderr[-5000:]
        trained[ranks] = AutoModelForCausalLM.from_pretrained(output / "export").state_dict()
        assert load_file(output / "export/masks.safetensors").keys() == load_file(source / "masks.safetensors").keys()
    first = AutoModelForCausalLM.from_pretrained(source).state_dict()
    moved = 0
    for name, value in trained[1].items():
        two = trained[2][name]
        assert value.ne(0).equal(two.ne(0)), name
        moved += not value.equal(first[name])
        assert (value - two).abs().max() < 1e-5, name
    assert moved >= 14  # the sparse layers at least

"""`fine-tune` on several ranks: the same links, and adapters that are merged as in one process."""

import json
from pathlib import Path

import pytest
from launching import BIN, accelerate, launch
from safetensors.torch import load_file
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from hf_chts import SparsityConfig, export_sparse, sparsify
from hf_chts.data.embedded import embedded_tokenizer

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A sparse model, and as many pairs as a step takes, so that their order does not matter, and one held out."""
    source = tmp_path_factory.mktemp("source")
    model = tiny_llama(vocab_size=300)
    sparsify(model, SparsityConfig(method="set", sparsity=0.8, storage="links"))
    export_sparse(model, source, tokenizer=embedded_tokenizer(300))
    rows = [json.dumps({"prompt": f"{n:02}:", "completion": f"{99 - n:02}"}) for n in range(17)]
    (source / "pairs.jsonl").write_text("\n".join(rows))
    return source


def options(source, output, ranks):
    return [
        "--model", str(source), "--dataset", str(source / "pairs.jsonl"), "--output_dir", str(output),
        "--max_steps", "6", "--per_device_train_batch_size", str(16 // ranks), "--learning_rate", "0.1",
        "--optim", "sgd", "--use_cpu", "true", "--save_strategy", "no",
    ]  # fmt: skip


def torchrun(ranks, *options):
    command = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(ranks)]
    launch([*command, "-m", "hf_chts", "fine-tune", *options])


def check_alike(source, one, two):
    """Exports of one process and of several have the model's links and, up to rounding, equal weights that moved."""
    assert load_file(two / "masks.safetensors").keys() == load_file(source / "masks.safetensors").keys()
    first, expected, found = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (source, one, two))
    moved = 0
    for name, value in expected.items():
        assert value.ne(0).equal(found[name].ne(0)), name
        assert (value - found[name]).abs().max() < 1e-5, name
        moved += not value.equal(first[name])
    assert moved >= 14  # the sparse layers at least


@pytest.mark.distributed
@pytest.mark.parametrize("lora", [[], ["--lora_rank", "4"]], ids=["links", "adapters"])
def test_two_ranks(source, tmp_path, lora):
    for ranks in (1, 2):
        torchrun(ranks, *options(source, tmp_path / str(ranks), ranks), *lora)
    check_alike(source, tmp_path / "1/export", tmp_path / "2/export")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("config", "engine"), [("cpu_fsdp2", "Fsdp2Weights"), ("cpu_zero3", "ZeroStage3Weights")])
def test_engines_that_split_weights(source, tmp_path, config, engine):
    pytest.importorskip("deepspeed")
    torchrun(1, *options(source, tmp_path / "one", 1))
    worker = Path(__file__).with_name("fine_tune_worker.py")
    printed = accelerate(config, worker, *options(source, tmp_path / "two", 2))
    assert f"engine: {engine}" in printed
    check_alike(source, tmp_path / "one/export", tmp_path / "two/export")

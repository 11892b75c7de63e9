"""What only a GPU can show. Nothing here runs where there is none."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import CASES, Invariants, case_config, losses, same_weights, trainer, weights
from test_link_products import both, case
from tiny import random_blocks, tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from hf_chts import sparsify
from hf_chts.layers.weight_parts import kernels

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.mark.parametrize("storage", ["masked", "links"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("case", CASES)
def test_invariants_repetition_and_resume(case, bf16, storage, tmp_path):
    settings = {"use_cpu": False, "bf16": bf16, "storage": storage}
    runs = []
    for name in ("first", "second"):
        run = trainer(tmp_path / name, case, **settings)
        assert {layer.topology.device.type for layer in run.sparse.layers.values()} == {"cuda"}
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


def test_storages_give_the_same_weights(tmp_path):
    assert kernels("cuda") is not None
    runs = {}
    for storage in ("masked", "links"):
        options = {"use_cpu": False, "max_grad_norm": 0.0, "optim": "adamw_torch"}
        runs[storage] = trainer(tmp_path / storage, "chtss", storage=storage, **options)
        runs[storage].train()
    assert losses(runs["masked"]) == losses(runs["links"])
    for name, layer in runs["links"].sparse.layers.items():
        assert layer.weight.equal(runs["masked"].sparse.layers[name].weight), name


@pytest.mark.parametrize("transposed", [False, True])
def test_odd_widths_are_padded_for_tensor_cores(transposed):
    slots, *leaves = case(transposed, dtype=torch.bfloat16, vacant=3)
    slots = replace(slots, positions=slots.positions.cuda())
    assert slots.padded(leaves[2].cuda())[not transposed] == 40
    dense, linked, _ = both(slots, *(leaf.cuda() for leaf in leaves))
    for one, other in zip(dense, linked, strict=True):
        torch.testing.assert_close(other, one, rtol=2e-2, atol=2e-2)


def test_compiled_links(tmp_path):
    model = tiny_llama().cuda()
    sparsify(model, case_config("chts", storage="links"))
    ids = torch.tensor(random_blocks(4)["input_ids"]).cuda()
    found = []
    for run in (model, torch.compile(model)):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=5e-2, atol=5e-3)


def test_a_large_model_is_made_on_the_gpu():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    sparse = sparsify(model, case_config("chts", storage="links"))
    sparse.materialize("cuda")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}
    for layer in sparse.layers.values():
        assert 0.015 < layer.link_values.std() < 0.025
    model(input_ids=torch.zeros(1, 8, dtype=torch.long, device="cuda")).logits.sum().backward()


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

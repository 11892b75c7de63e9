"""What only a GPU can show. Nothing here runs where there is none."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import CASES, IN_SLOTS, Invariants, case_config, losses, same_weights, trainer, weights
from packed_cases import CASES as PACKED
from packed_cases import TOLERANCE, weight_of
from test_link_products import both, case
from tiny import random_blocks, tiny_llama
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from hf_chts import SparsityConfig, export_sparse, load_sparse, sparsify
from hf_chts.layers.packed_model import packed_layers
from hf_chts.layers.packed_products import products, row_kernel
from hf_chts.layers.row_links import RowLinks
from hf_chts.layers.weight_parts import kernels

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.mark.parametrize(
    ("storage", "case"), [*(("masked", case) for case in CASES), *(("links", case) for case in IN_SLOTS)]
)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16 autocast"])
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
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
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


@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_packed_products(case, dtype):
    mask, weight = (tensor.cuda() for tensor in weight_of(case, dtype))
    assert row_kernel("cuda") is not None
    links = RowLinks.of(*mask.nonzero(as_tuple=True), weight[mask], tuple(mask.shape))
    assert links.dense().equal(weight)
    for tokens in (1, 16):
        x, bias = torch.randn(tokens, mask.shape[1]).to("cuda", dtype), torch.randn(mask.shape[0]).to("cuda", dtype)
        expected = x.double() @ weight.double().t()
        plain, with_bias = products(x, [links, links], [None, bias])
        torch.testing.assert_close(plain.double(), expected, **TOLERANCE[dtype])
        torch.testing.assert_close(with_bias.double(), expected + bias.double(), **TOLERANCE[dtype])
    # more tokens take the dense weight, whose products cuBLAS may add up in 16 bits
    x = torch.randn(17, mask.shape[1]).to("cuda", dtype)
    torch.testing.assert_close(products(x, [links], [None])[0], functional.linear(x, weight))


@torch.no_grad()
def test_a_packed_model(tmp_path):
    model = tiny_llama(num_key_value_heads=2)
    sparsify(model, SparsityConfig("set", sparsity=0.8))
    export_sparse(model, tmp_path, packed=True)
    dense, packed = LlamaForCausalLM.from_pretrained(tmp_path).cuda(), load_sparse(tmp_path, compute="sparse").cuda()
    assert all(isinstance(layer.packed, RowLinks) for layer in packed_layers(packed).values())
    ids = torch.arange(24, device="cuda")[None] % 7
    for length in (1, 24):
        torch.testing.assert_close(packed(ids[:, :length]).logits, dense(ids[:, :length]).logits, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"cache_implementation": "static"}):  # the second is compiled, and recorded as a CUDA graph
        told = [one.generate(ids[:, :3], **options, **more) for one in (packed, dense)]
        assert told[0].equal(told[1])
    graph, inputs = torch.cuda.CUDAGraph(), torch.randn(1, packed.config.hidden_size, device="cuda")
    layer = packed.model.layers[0].self_attn.o_proj
    layer(inputs)
    with torch.cuda.graph(graph):
        found = layer(inputs)
    graph.replay()
    torch.testing.assert_close(found, dense.model.layers[0].self_attn.o_proj(inputs))

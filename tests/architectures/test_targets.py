"""What is refused, by name and before anything is touched."""

import pytest
import torch
from tiny_architectures import ARCHITECTURES
from torch import nn
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from hf_chts import SparsityConfig, SparsityHandle, sparsify


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}, [type(m) for m in model.modules()]


def assert_refused(model, config, message):
    weights, types = snapshot(model)
    with pytest.raises(ValueError, match=message):
        sparsify(model, config)
    after, types_after = snapshot(model)
    assert types_after == types
    assert all(after[name].equal(weights[name]) for name in weights)
    assert SparsityHandle.of(model) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mixtral",
            r"model.layers.0.mlp.experts is a MixtralExperts, whose parameter gate_up_proj \(3, \d+, \d+\) holds",
        ),
        ("qwen3_moe", r"layers.0.mlp.experts is a Qwen3MoeExperts, whose parameter gate_up_proj \(3, \d+, \d+\) holds"),
    ],
)
def test_experts_in_one_parameter(name, message):
    model = ARCHITECTURES[name].model()
    assert_refused(
        model, SparsityConfig(), f"{message} .* in target_modules. Linear layers .*: q_proj, k_proj, v_proj, o_proj$"
    )
    assert_refused(model, SparsityConfig(target_modules=["gate"]), "'gate', which matches no linear layer")
    assert sparsify(model, SparsityConfig(method="dense")).layers == {}


def test_experts_one_below_the_other():
    heads = {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8}
    experts = {"hidden_size": 12, "ffn_hidden_size": 8, "moe_num_experts": 3, "moe_top_k": 1}
    config = DbrxConfig(
        d_model=12, n_heads=3, n_layers=1, max_seq_len=32, vocab_size=96, attn_config=heads, ffn_config=experts
    )
    message = r"transformer.blocks.0.ffn.experts.mlp is a DbrxExpertGLU, whose parameter w1 \(24, 12\) holds several"
    assert_refused(DbrxForCausalLM(config), SparsityConfig(), message)


def switch_transformers():
    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            vocab_size=96, d_model=12, d_kv=4, d_ff=20, num_layers=1, num_decoder_layers=1, num_heads=3, num_experts=2,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=0,
        )
    )  # fmt: skip


def test_experts_that_are_linear_layers_are_sparse_and_their_router_is_not():
    mlp = "encoder.block.0.layer.1.mlp"
    experts = [f"{mlp}.experts.expert_{i}.{name}" for i in (0, 1) for name in ("wi", "wo")]
    config = SparsityConfig(method="set", sparsity=0.5)
    layers = sparsify(switch_transformers(), config).layers
    assert [name for name in layers if name.startswith(mlp)] == experts
    named = SparsityConfig(method="set", sparsity=0.5, target_modules=[r"encoder.*\.mlp\..*"])
    assert list(sparsify(switch_transformers(), named).layers) == [f"{mlp}.router.classifier", *experts]


def test_stacked_matrices_and_other_parameters_of_many_dimensions():
    class Block(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.proj = nn.Linear(6, 6)
            self.conv = nn.Conv1d(6, 6, 3)
            self.mix = nn.Parameter(torch.ones(shape))

    def model(*shape):
        network = nn.Module()
        network.layers = nn.ModuleList([Block(*shape)])
        return network

    config = SparsityConfig(sparsity=0.5, method="set")
    assert list(sparsify(model(1, 1, 6), config).layers) == ["layers.0.proj"]
    assert_refused(model(2, 6, 6), config, r"layers.0 is a Block, whose parameter mix \(2, 6, 6\) holds several")
    assert_refused(model(1, 6, 6), config, r"layers.0 is a Block, whose parameter mix \(1, 6, 6\) holds several")


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "t5", "marian", "phi3", "opt", "mixtral", "qwen3_moe"])
def test_percolation_of_an_unknown_architecture(name):
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    config = SparsityConfig(percolation=True, target_modules=architecture.target_modules)
    kind = type(model).__name__
    assert_refused(model, config, rf"percolation is not known for {kind} \(model_type '{model.config.model_type}'\)")

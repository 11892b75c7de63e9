"""Dense models that are as small as a sparse run."""

import pytest
import torch
from tiny import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from hf_chts import SparsityConfig, sparsify
from hf_chts.baseline import baseline_of, dense_baseline
from hf_chts.evolution.update_figures import average_links

SIZES = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3, "vocab_size": 500}
LLAMA = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
QWEN = Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=128)


def outline(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def of_blocks(config):
    return sum(m.weight.numel() for m in outline(config).model.layers.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("config", [LLAMA, QWEN])
@pytest.mark.parametrize("sparsity", [0.7, 0.9])
def test_a_baseline_has_as_many_weights_as_the_run_has_links(config, sparsity):
    made = dense_baseline("same_links", config, SparsityConfig("set", sparsity=sparsity))
    assert abs(of_blocks(made) - (1 - sparsity) * of_blocks(config)) <= 3 * 3 * made.hidden_size / 2 + 21
    assert made.num_hidden_layers == 3
    assert made.head_dim % 2 == 0
    assert baseline_of(made) == baseline_of(made.to_dict()) == f"same_links of set at {sparsity:.2%}"
    ids = torch.randint(500, (1, 8))
    assert AutoModelForCausalLM.from_config(made)(ids).logits.isfinite().all()


def test_same_average_is_the_mean_over_the_steps():
    config = SparsityConfig("granet", sparsity=0.9, initial_sparsity=0.5, sparsity_schedule="linear", update_until=0.5)
    made = dense_baseline("same_average", LLAMA, config, max_steps=1000)
    # 100 steps each at 50, 58, 66, 74 and 82% sparsity, then 500 at 90%
    assert made.hf_chts_baseline["wanted"] == pytest.approx(of_blocks(LLAMA) * (0.1 * 1.7 + 0.05), rel=1e-3)


def test_same_bytes_counts_links_positions_and_bits():
    config = SparsityConfig("set", sparsity=0.9, storage="links")
    made = dense_baseline("same_bytes", LLAMA, config)
    blocks, everything = of_blocks(LLAMA), sum(p.numel() for p in outline(LLAMA).parameters())
    taken = 16 * (everything - blocks) + blocks * (0.1 * 20 + 0.125)
    assert 16 * sum(p.numel() for p in outline(made).parameters()) == pytest.approx(taken, rel=0.005)


@pytest.mark.parametrize(
    ("kind", "fields", "options", "message"),
    [
        ("same_bytes", {"method": "set"}, {}, "more than .* dense model of the same size.* Set storage: links$"),
        ("same_bytes", {"method": "gmp"}, {}, "dense model of the same size.* same_links$"),
        ("same_bytes", {"method": "set", "storage": "links"}, {"optimizer": "sgd"}, "optim is 'sgd'"),
        ("same_bytes", {"method": "gmp", "storage": "links"}, {}, "regrown_weights 'historical'"),
        ("same_average", {"method": "gmp"}, {}, "max_steps is 0"),
        ("same_links", {"method": "set", "sparsity": 0.9999}, {}, "4 heads cannot be so narrow.*take fewer heads"),
        ("same_links", {"method": "dense"}, {}, "method is 'dense'"),
    ],
)
def test_where_there_is_no_such_model_it_is_said(kind, fields, options, message):
    with pytest.raises(ValueError, match=message):
        dense_baseline(kind, LLAMA, SparsityConfig(**fields), **options)


def test_links_are_averaged_from_the_history():
    history = [
        {"step": 2, "links_removed": 50, "links_regrown": 10},
        {"step": 5, "links_removed": 30, "links_regrown": 30},
    ]
    assert average_links(history, 60, 10) == (2 * 100 + 8 * 60) / 10
    sparse = sparsify(tiny_llama(), SparsityConfig("set"))
    assert average_links([], sparse.links(), 7) == sparse.links()

"""Blocks of rows for the heads of attentions that have other heads than the model's config says."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from hf_chts import SparsityConfig, sparsify

LATENT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 20,
    "first_k_dense_replace": 1, "max_position_embeddings": 32,
}  # fmt: skip


def blocks(model, **changes):
    sparse = sparsify(model, SparsityConfig(method="static", sparsity=0.5, per_head=True, **changes))
    for name, n in sparse.blocks.items():
        parts = sparse.masks()[name].chunk(n)
        assert len(parts) == n
        links = [int(part.sum()) for part in parts]
        assert max(links) - min(links) <= 1, name
    return {name.rpartition(".")[2]: (n, sparse.masks()[name].shape[0] // n) for name, n in sparse.blocks.items()}


def test_latent_attention():
    # (heads, rows of a head): queries of 16 + 8, keys of 16 and values of 20
    assert blocks(DeepseekV3ForCausalLM(DeepseekV3Config(**LATENT, q_lora_rank=48))) == {
        "q_b_proj": (4, 24),
        "kv_b_proj": (4, 36),
    }
    assert blocks(DeepseekV3ForCausalLM(DeepseekV3Config(**LATENT, q_lora_rank=None))) == {
        "q_proj": (4, 24),
        "kv_b_proj": (4, 36),
    }


def test_other_names():
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 96}
    bert = BertModel(BertConfig(**sizes, num_attention_heads=3))
    assert blocks(bert) == dict.fromkeys(("query", "key", "value"), (3, 8))
    phi = Phi3ForCausalLM(Phi3Config(**sizes, num_attention_heads=3, num_key_value_heads=1, pad_token_id=0))
    assert blocks(phi) == {"qkv_proj": (5, 8)}  # three of queries, one of keys, one of values


def test_rows_that_are_no_heads_are_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 96}
    experts = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    # each head's gate is among the rows of its queries
    model = Qwen3NextForCausalLM(
        Qwen3NextConfig(**sizes, **experts, **heads, shared_expert_intermediate_size=16, layer_types=["full_attention"])
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"q_proj has 64 rows, which are not the 2 heads of 16"):
        blocks(model)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert blocks(model, exclude_modules=["q_proj"]) == {"k_proj": (2, 16), "v_proj": (2, 16)}


def test_an_attention_that_tells_nothing_is_refused():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(32, 32)

    model = nn.Module()
    model.config = BertConfig(hidden_size=32, num_attention_heads=4)  # of which it says nothing that it has them too
    model.layers = nn.ModuleList([Attention()])
    with pytest.raises(ValueError, match=r"layers.0, a Attention, does not tell the size of a head \(head_dim"):
        blocks(model)
    model.layers[0].head_dim, model.layers[0].num_heads = 16, 2
    assert blocks(model) == {"q_proj": (2, 16)}
    assert torch.is_tensor(model.layers[0].q_proj.mask)

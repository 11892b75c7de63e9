"""How links are shared out: overrides by layer, blocks of rows for heads, the largest weights of all layers."""

import pytest
import torch
from cases import INTERVAL, case_config
from tiny import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

from hf_chts import SparsityConfig, sparsify
from hf_chts.evolution.evolver import Evolver
from hf_chts.layers.heads import head_blocks
from hf_chts.layers.shares import layer_links, overrides
from hf_chts.sharding.replicated import ReplicatedWeights

SHAPES = {"a.up": (10, 20), "a.down": (20, 10), "b.up": (30, 10), "b.down": (10, 30)}


def links(sparsity, **changes):
    config = SparsityConfig(method="chtss", **({"sparsity": 0.9} | changes))
    return layer_links(SHAPES, sparsity, config, {})


def test_an_override_follows_the_schedule_in_proportion():
    assert links(0.9, layer_sparsity={"down": 0.6}) == {"a.up": 20, "a.down": 80, "b.up": 30, "b.down": 120}
    # at half of the run's sparsity, half of the layer's own
    assert links(0.45, layer_sparsity={"a.down": 0.6}) == {"a.up": 110, "a.down": 140, "b.up": 165, "b.down": 165}


def test_other_allocations_share_out_what_is_not_overridden():
    shared = links(0.9, layer_sparsity={r"a\..*": 0.5}, allocation="erdos_renyi")
    assert shared["a.up"] == shared["a.down"] == 100
    assert (shared["b.up"], shared["b.down"]) == (30, 30)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"sideways": 0.5}, "'sideways', which matches no sparse layer.*a.up, a.down"),
        ({"up": 0.5, "a.up": 0.6}, "'up' and 'a.up', which both match a.up"),
    ],
)
def test_patterns_that_cannot_be_meant(patterns, message):
    with pytest.raises(ValueError, match=message):
        overrides(SHAPES, SparsityConfig(layer_sparsity=patterns))
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="layer_sparsity"):
        sparsify(model, SparsityConfig(layer_sparsity={"no_such_proj": 0.5}))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_blocks_of_heads():
    def blocks(model):
        shapes = {
            name: tuple(p.shape if model.config.model_type != "gpt2" else p.shape[::-1])
            for name, p in ((n.removesuffix(".weight"), p) for n, p in model.named_parameters())
            if p.dim() == 2
        }
        found = head_blocks(model, shapes)
        return {name.rpartition(".")[2]: n for name, n in found.items()}

    assert blocks(tiny_llama(num_key_value_heads=2)) == {"q_proj": 4, "k_proj": 2, "v_proj": 2}
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=12, n_head=3, n_layer=1, vocab_size=8, n_positions=8))
    assert blocks(gpt2) == {"c_attn": 9}
    neox = GPTNeoXForCausalLM(
        GPTNeoXConfig(hidden_size=12, num_attention_heads=3, num_hidden_layers=1, intermediate_size=8, vocab_size=8)
    )
    assert blocks(neox) == {"query_key_value": 9}
    t5 = T5(T5Config(d_model=12, d_kv=5, num_heads=3, d_ff=8, num_layers=1, vocab_size=8))
    assert blocks(t5) == {"q": 3, "k": 3, "v": 3}


def test_per_head_is_refused_where_there_are_no_heads():
    with pytest.raises(ValueError, match="no sparse layer of LlamaForCausalLM projects onto heads"):
        sparsify(tiny_llama(), SparsityConfig(per_head=True, target_modules=["down_proj", "up_proj"]))
    with pytest.raises(ValueError, match="does not tell the size of a head"):
        head_blocks(torch.nn.Linear(2, 2), {"q_proj": (2, 2)})


def updated(config, model):
    """A model's (masks, weights before, gradients, masks after) at its first update."""
    sparse = sparsify(model, config)
    callback = Evolver(sparse)
    engine = ReplicatedWeights(torch.optim.AdamW(model.parameters()))
    callback.prepare(8 * INTERVAL, engine)
    before = {name: mask.clone() for name, mask in sparse.masks().items()}
    weights = {name: layer.weight.detach().clone() for name, layer in sparse.layers.items()}
    gradients = {}
    for name, layer in sparse.layers.items():
        gradients[name] = torch.randn_like(layer.weight)
        if config.needs_gradient:
            layer.dense_gradient = engine.dense_gradient(layer, 0)
            layer.dense_gradient.add_(gradients[name])
    callback.update(INTERVAL)
    return before, weights, gradients, sparse.masks()


def test_each_head_evolves_alone():
    config = case_config("rigl", per_head=True, drop_fraction=0.4, drop_schedule="constant", sparsity=0.8)
    before, weights, gradients, after = updated(config, tiny_llama(num_key_value_heads=2))
    heads = {"q_proj": 4, "k_proj": 2, "v_proj": 2}
    for name in before:
        n = heads.get(name.rpartition(".")[2], 1)
        for mask, weight, gradient, new in zip(
            *(t.chunk(n) for t in (before[name], weights[name], gradients[name], after[name])), strict=True
        ):
            count = int(mask.sum())
            assert int(new.sum()) == count == round(0.2 * mask.numel())
            drop = round(0.4 * count)
            weakest = sorted(mask.nonzero().tolist(), key=lambda link: abs(weight[tuple(link)].item()))[:drop]
            kept = mask.clone()
            for link in weakest:
                kept[tuple(link)] = False
            best = sorted((~kept).nonzero().tolist(), key=lambda link: -abs(gradient[tuple(link)].item()))[:drop]
            for link in best:
                kept[tuple(link)] = True
            assert new.equal(kept)


def test_global_pruning_keeps_the_largest_weights_of_all_layers():
    config = case_config("gmp", allocation="global", sparsity=0.9, initial_sparsity=0.3)
    before, weights, _, after = updated(config, tiny_llama())
    total = sum(int(mask.sum()) for mask in after.values())
    every = torch.cat([weights[name].abs().flatten() for name in before])
    threshold = every.topk(total).values[-1]
    for name, mask in after.items():
        assert mask.equal(weights[name].abs() >= threshold)
    assert total < sum(int(mask.sum()) for mask in before.values())


@pytest.mark.parametrize(
    ("fields", "blocks", "fewest"),
    [({"pattern": "fan_in"}, {}, 6), ({"per_head": True}, {"weak": 3}, 3), ({}, {}, 1)],
    ids=["an output", "a head", "a layer"],
)
def test_global_allocation_leaves_a_link_to(fields, blocks, fewest):
    torch.manual_seed(0)
    weights = {"weak": 1e-3 * torch.rand(6, 5), "strong": 1 + torch.rand(6, 5)}
    config = SparsityConfig("gmp", sparsity=0.8, allocation="global", **fields)
    links = layer_links(dict.fromkeys(weights, (6, 5)), 0.8, config, weights, blocks)
    assert links == {"weak": fewest, "strong": 12 - fewest}

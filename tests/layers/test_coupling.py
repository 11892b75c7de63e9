"""Percolation on real models: links that go never mattered nor learned, and those that stay do."""

import pytest
import torch
import transformers
from torch import nn

from hf_chts import SparsityConfig, sparsify
from hf_chts.layers.coupling import couplings
from hf_chts.topology.percolation import coupled_groups, percolate
from hf_chts.topology.random_streams import random_stream

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama gqa": ("Llama", {}),
    "llama wide heads": ("Llama", {"head_dim": 6}),
    "llama biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama sigmoid": ("Llama", {"hidden_act": "sigmoid"}),  # not 0 at 0
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {"head_dim": None}),  # bias on q, k and v
    "qwen3": ("Qwen3", {}),  # q and k normalised per head
    "gemma3": ("Gemma3", {"layer_types": ["sliding_attention", "full_attention"]}),
}
# What a bias on the producing side keeps whole: a biased row feeds its reader even without a link
UNTOUCHED = {"llama biased": {"q or k", "o_proj", "down_proj"}, "qwen2": {"q or k", "o_proj"}}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def tiny(family, **changes):
    settings = SIZES | changes
    settings = {name: value for name, value in settings.items() if value is not None}
    config = getattr(transformers, f"{family}{'Text' if family == 'Gemma3' else ''}Config")(**settings)
    transformers.set_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:  # biases start at 0 otherwise
                parameter.normal_(0, 0.4)
    return model


def drawn_masks(model, seed):
    """A third of the links, and two rows and columns in five without any; but no head that nobody reads at all."""
    generator = random_stream(seed, "coupling")
    masks = {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and "proj" in name:
            outputs, inputs = linear.weight.shape
            mask = torch.rand(outputs, inputs, generator=generator) < 0.4
            mask &= torch.rand(outputs, 1, generator=generator) < 0.6
            mask &= torch.rand(1, inputs, generator=generator) < 0.6
            head_dim = getattr(model.get_submodule(name.rpartition(".")[0]), "head_dim", None)
            if name.endswith("v_proj"):
                mask[::head_dim, 0] = True
            if name.endswith("o_proj"):
                mask[0, ::head_dim] = True
            masks[name] = mask
    return masks


def outcome(model, sparse, masks):
    """The logits, and which weights get a gradient."""
    for name, layer in sparse.layers.items():
        layer.set_mask(masks[name])
    model.zero_grad()
    ids = torch.randint(3, 32, (3, 9), generator=random_stream("ids"))
    logits = model(input_ids=ids).logits
    (logits * torch.randn(logits.shape, generator=random_stream("loss"), dtype=torch.float64)).sum().backward()
    return logits.detach(), {name: layer.weight.grad != 0 for name, layer in sparse.layers.items()}


@pytest.mark.parametrize("name", MODELS)
def test_links_that_go_never_mattered_and_those_that_stay_do(name):
    family, changes = MODELS[name]
    removed = dict.fromkeys(ATTENTION + MLP, 0)
    for seed in range(3):
        model = tiny(family, **changes)
        masks = drawn_masks(model, seed)
        sparse = sparsify(model, SparsityConfig(method="static", target_modules=[".*_proj"]), masks=masks)
        left = percolate(masks, couplings(model, list(sparse.layers)))
        before, learns = outcome(model, sparse, masks)
        after, still_learns = outcome(model, sparse, left)
        assert after.equal(before)
        for layer, mask in left.items():
            # the gradient of a useless link is exactly 0, and no other's is
            assert learns[layer].equal(mask)
            assert still_learns[layer].equal(mask)
            removed[layer.rpartition(".")[2]] += int((masks[layer] & ~mask).sum())
    removed["q or k"] = removed.pop("q_proj") + removed.pop("k_proj")
    assert {projection for projection in removed if not removed[projection]} == UNTOUCHED.get(name, set())


@pytest.mark.parametrize("name", MODELS)
def test_groups_in_the_model_s_order(name):
    family, changes = MODELS[name]
    model = tiny(family, **changes)
    layers = [layer for layer, module in model.named_modules() if isinstance(module, nn.Linear)]
    expected = []
    for block in ("model.layers.0.", "model.layers.1."):
        pairs = [["q_proj"], ["k_proj"]] if name in ("llama biased", "qwen2") else [["q_proj", "k_proj"]]
        expected += [[f"{block}self_attn.{p}" for p in group] for group in [*pairs, ["v_proj", "o_proj"]]]
        expected.append([f"{block}mlp.{p}" for p in MLP])
    assert coupled_groups(couplings(model, layers), layers) == [*expected, ["lm_head"]]


@pytest.mark.parametrize(
    ("targets", "groups"),
    [
        (["q_proj"], []),
        (["q_proj", "v_proj", "down_proj"], []),
        (["up_proj", "down_proj"], [["up_proj", "down_proj"]]),
        (["gate_proj", "up_proj"], [["gate_proj", "up_proj"]]),
        (["k_proj", "q_proj", "o_proj"], [["q_proj", "k_proj"]]),
    ],
)
def test_layers_that_stay_dense_are_full(targets, groups):
    model = tiny("Llama")
    lost = 0
    for seed in range(3):
        drawn = drawn_masks(model, seed)
        masks = {name: mask for name, mask in drawn.items() if name.endswith(tuple(targets))}
        junctions = couplings(model, list(masks))
        found = [group for group in coupled_groups(junctions, list(masks)) if len(group) > 1]
        assert [[layer.rpartition(".")[2] for layer in group] for group in found] == groups * 2
        full = {name: masks.get(name, torch.ones_like(mask)) for name, mask in drawn.items()}
        expected = percolate(full, couplings(model, list(drawn)))
        left = percolate(masks, junctions)
        assert left.keys() == masks.keys()
        assert all(left[name].equal(expected[name]) for name in masks)
        lost += sum(int((masks[name] & ~left[name]).sum()) for name in masks)
    assert (lost > 0) == bool(groups)


TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 32}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("config", "model", "settings"),
    [
        ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 16, "n_layer": 1, "n_head": 4, "vocab_size": 32, **IDS}),
        ("OPTConfig", "OPTForCausalLM", {**TINY, **IDS, "ffn_dim": 24, "word_embed_proj_dim": 16}),
        ("Phi3Config", "Phi3ForCausalLM", {**TINY, **IDS}),
        ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**TINY, **IDS}),
        ("T5Config", "T5ForConditionalGeneration", {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, **IDS}),
        ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**TINY, **IDS, "num_experts": 2, "moe_intermediate_size": 8}),
    ],
)
def test_architectures_that_are_not_known(config, model, settings):
    kind = getattr(transformers, config)
    settings = {"max_position_embeddings": 32} | settings
    with pytest.raises(ValueError, match=f"not known for {model} .*'{kind.model_type}'.* set percolation to false"):
        couplings(getattr(transformers, model)(kind(**settings)), [])


class OtherMLP(nn.Module):
    def __init__(self, of):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = of.gate_proj, of.up_proj, of.down_proj


def another_mlp(model):
    model.model.layers[1].mlp = OtherMLP(model.model.layers[1].mlp)


def an_adapter(model):
    model.model.layers[1].self_attn.adapter = nn.Linear(16, 16)


def wrong_heads(model):
    model.config.num_key_value_heads = 4


def wrong_neurons(model):
    model.model.layers[0].mlp.down_proj = nn.Linear(20, 16)


def no_linear(model):
    model.model.layers[0].self_attn.k_proj = nn.Identity()


def part_rotated(model):
    model.config.rope_parameters["partial_rotary_factor"] = 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_mlp, r"not known for model.layers.1.mlp.gate_proj in a OtherMLP: set percolation to false, or leave"),
        (an_adapter, r"not known for model.layers.1.self_attn.adapter: set percolation to false"),
        (wrong_heads, r"model.layers.0.self_attn, whose k_proj.out_features is 8: .* or make it 16"),
        (wrong_neurons, r"model.layers.0.mlp, whose down_proj.in_features is 20: .* or make it 24"),
        (no_linear, r"model.layers.0.self_attn, whose k_proj is a Identity"),
        (part_rotated, r"LlamaForCausalLM with partial_rotary_factor 0.5"),
    ],
)
def test_a_changed_model_is_refused_by_name(change, message):
    model = tiny("Llama")
    change(model)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with pytest.raises(ValueError, match=message):
        couplings(model, layers)


def test_a_name_that_is_no_layer():
    with pytest.raises(ValueError, match="model.layers.7.mlp.up_proj is no linear layer of LlamaForCausalLM"):
        couplings(tiny("Llama"), ["model.layers.7.mlp.up_proj"])

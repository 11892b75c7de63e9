"""What is sparse by default in models that have more than projections, and what config leaves out of it."""

import pytest
import torch
from tiny import tiny_llama
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_chts import SparsityConfig, SparsityHandle, sparsify
from hf_chts.layers.targets import SMALLEST_SIDE, why_dense
from hf_chts.training.begin_lines import layer_lines

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96,
}  # fmt: skip
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(**changes):
    return SparsityConfig(**({"method": "static", "sparsity": 0.5} | changes))


def mamba():
    return MambaForCausalLM(
        MambaConfig(vocab_size=96, hidden_size=64, state_size=8, num_hidden_layers=2, time_step_rank=16)
    )


def llava():
    vision, text = CLIPVisionConfig(**VISION), LlamaConfig(**TEXT)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=5))


def whisper():
    sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 48}
    both = {f"{end}_{name}": size for end in ("encoder", "decoder") for name, size in sizes.items()}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    lengths = {"max_source_positions": 16, "max_target_positions": 16, "num_mel_bins": 8}
    quiet = {"begin_suppress_tokens": None, "suppress_tokens": None}
    return WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=96, d_model=32, **both, **tokens, **lengths, **quiet)
    )


def gemma3n():
    layers = {"layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0, 0.0]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_kv_shared_layers": 0}
    sizes = {"hidden_size": 128, "intermediate_size": 256, "hidden_size_per_layer_input": 32, "laurel_rank": 16}
    vocabulary = {"vocab_size": 96, "vocab_size_per_layer_input": 96, "pad_token_id": 0}
    return Gemma3nForCausalLM(Gemma3nTextConfig(num_hidden_layers=2, **layers, **heads, **sizes, **vocabulary))


def kinds(names):
    return sorted({name.rpartition(".")[2] for name in names})


@pytest.mark.parametrize(
    ("model", "sparse", "dense"),
    [
        (mamba, ["in_proj", "out_proj"], ["dt_proj", "lm_head", "x_proj"]),
        (
            gemma3n,
            sorted([*LLAMA, "linear_left", "linear_right", "per_layer_projection"]),
            # the first three are outside the blocks, where others of their list are called 0, 1 and 2
            ["0", "1", "2", "correction_coefs", "lm_head", "modality_router", "per_layer_input_gate",
             "per_layer_model_projection", "prediction_coefs"],
        ),
        (
            lambda: ViTForImageClassification(ViTConfig(**VISION)),
            ["fc1", "fc2", "k_proj", "o_proj", "q_proj", "v_proj"],
            ["classifier"],
        ),
        (whisper, ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"], ["proj_out"]),
    ],
)  # fmt: skip
def test_what_people_would_choose(model, sparse, dense):
    model = model()
    handle = sparsify(model, config())
    assert kinds(handle.layers) == sparse
    assert kinds(why_dense(model, handle.config, handle.layers)) == dense


def test_the_text_model_of_several():
    model = llava()
    layers = sparsify(model, config()).layers
    assert sorted(layers) == sorted(
        f"model.language_model.layers.{i}.{part}.{name}"
        for i in (0, 1)
        for part, names in (("self_attn", LLAMA[:4]), ("mlp", LLAMA[4:]))
        for name in names
    )
    named = sparsify(llava(), config(target_modules=[r"model\.vision_tower\..*\.q_proj"])).layers
    assert len(named) == 2


class Block(nn.Module):
    def __init__(self, **shapes):
        super().__init__()
        for name, (out, inn) in shapes.items():
            setattr(self, name, nn.Linear(inn, out))


def blocks(**shapes):
    model = nn.Module()
    model.layers = nn.ModuleList([Block(**shapes)])
    return model


def test_single_layers():
    """By name and shape: (out, in)."""
    shapes = {
        "router": (32, 300), "gate": (32, 300), "shared_expert_gate": (40, 300), "wg": (16, 300),
        "gate_proj": (32, 300), "gate_up_proj": (32, 300), "w_gate": (300, 300), "gated": (32, 300),
        "query_lora_A": (32, 300), "adapter": (32, 300), "adapters_up": (300, 32), "explorational": (32, 300),
        "dt_proj": (300, 32), "a_proj": (32, 300), "q_a_proj": (32, 300),
        "narrow": (SMALLEST_SIDE - 1, 300), "thin": (300, SMALLEST_SIDE - 1), "enough": (SMALLEST_SIDE, 300),
    }  # fmt: skip
    sparse = sparsify(blocks(**shapes), config()).layers
    expected = ["gate_proj", "gate_up_proj", "w_gate", "gated", "explorational", "q_a_proj", "enough"]
    assert [name.removeprefix("layers.0.") for name in sparse] == expected


def test_in_a_toy_model_narrow_is_what_is_narrow_beside_others():
    shapes = {"up": (32, 8), "down": (8, 32), "two": (32, 2), "one": (1, 32)}
    assert list(sparsify(blocks(**shapes), config()).layers) == ["layers.0.up", "layers.0.down", "layers.0.two"]


def test_nothing_that_would_be_chosen_is_left():
    with pytest.raises(ValueError, match=r"sparse by default \(router or gate: layers.0.gate; a side"):
        sparsify(blocks(gate=(20, 300), thin=(300, 4)), config())
    sparsify(blocks(gate=(20, 300), thin=(300, 4)), config(target_modules=["gate"]))


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["k_proj", "mlp.down_proj"], [n for n in LLAMA if n not in ("k_proj", "down_proj")]),
        ("up_proj", [n for n in LLAMA if n != "up_proj"]),
        ([r".*\.self_attn\..*", "lm_head"], LLAMA[4:]),
    ],
)
def test_excluded(exclude, left):
    assert kinds(sparsify(tiny_llama(), config(exclude_modules=exclude)).layers) == sorted(left)


def test_excluded_among_those_that_are_named():
    named = {"target_modules": ["q_proj", "up_proj"], "exclude_modules": [r".*layers\.0\..*"]}
    layers = sparsify(tiny_llama(), config(**named)).layers
    assert list(layers) == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (["k_proj", "w2"], "exclude_modules has 'w2', which matches no linear layer"),
        ([r".*_proj"], "leaves no layer to make sparse"),
        (["("], "exclude_modules has '\\(', which is not a regular expression"),
        ([3], "exclude_modules is .*3.*; it must be a list"),
    ],
)
def test_exclusions_that_cannot_be_meant(exclude, message):
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        sparsify(model, config(exclude_modules=exclude))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert SparsityHandle.of(model) is None


def test_the_table_of_layers():
    model = blocks(up_proj=(48, 32), down_proj=(32, 48), gate=(16, 32), thin=(32, 1))
    model.layers.append(Block(up_proj=(48, 32), down_proj=(32, 48), gate=(16, 32), thin=(32, 1)))
    model.embed = nn.Embedding(10, 32)
    lines = layer_lines(sparsify(model, config(sparsity=0.75, exclude_modules=["down_proj"])))
    rows = [" ".join(line.split()) for line in lines]
    # 2 layers of 1536 weights; biases of 48 + 32 + 16 + 32 in each block, and the embedding
    assert rows[0] == "layers: 2 sparse with 768 links, 75.0% sparse"
    assert rows[1:-1] == [
        "2 × up_proj 48×32 768 links, 75.0% sparse",
        "2 × down_proj 32×48 dense: exclude_modules",
        "2 × gate 16×32 dense: router or gate",
        "2 × thin 32×1 dense: a side below 3",
    ]
    assert "576 weights" in rows[-1]


@pytest.mark.parametrize("masks", [False, True])
def test_the_meta_device_is_refused(masks):
    given = {name: torch.ones_like(mask) for name, mask in sparsify(tiny_llama(), config()).masks().items()}
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj is on the meta device, .* to_empty"):
        sparsify(model, config(), masks=given if masks else None)
    assert SparsityHandle.of(model) is None
    assert {type(module).__name__ for module in model.modules()} == {
        type(module).__name__ for module in tiny_llama().modules()
    }

"""load_sparse gives the class that the config names, or refuses in words that say why."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_finite import sparse_llama
from tiny import VOCABULARY, tiny_llama
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2DoubleHeadsModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    LlamaModel,
    set_seed,
)

from hf_chts import SparsityConfig, SparsityHandle, export_sparse, load_sparse, sparsify
from hf_chts.export import pack_directory

IDS = torch.arange(30).view(2, 15) % VOCABULARY
SMALL = {"hidden_size": 40, "intermediate_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4}


class ScaledLlama(LlamaForCausalLM):
    """A user's class with LLaMA's config, which is not registered."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = 2 * found.logits
        return found


class MineConfig(LlamaConfig):
    model_type = "mine"


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig


@pytest.fixture
def registered():
    AutoConfig.register("mine", MineConfig, exist_ok=True)
    AutoModelForCausalLM.register(MineConfig, MineForCausalLM, exist_ok=True)


def made(kind, config=LlamaConfig, **settings):
    set_seed(0)
    model = kind(config(vocab_size=VOCABULARY, **(settings or SMALL))).eval()
    sparsify(model, SparsityConfig(method="set", sparsity=0.5))
    return model


MODELS = {
    "a head for tokens": lambda: made(LlamaForTokenClassification, num_labels=5, **SMALL),
    "no head": lambda: made(LlamaModel),
    "without an Auto class": lambda: made(GPT2DoubleHeadsModel, GPT2Config, n_embd=40, n_layer=2, n_head=4),
    "a user's": lambda: made(ScaledLlama),
    "a user's, registered": lambda: made(MineForCausalLM, MineConfig),
}


@pytest.mark.parametrize("kind", ["plain", "packed", "packed without the model at hand"])
@pytest.mark.parametrize("name", MODELS)
def test_the_class_and_its_head(tmp_path, registered, name, kind):
    model = MODELS[name]()
    directory = export_sparse(model, tmp_path / "export", packed=kind == "packed")
    if kind == "packed without the model at hand":  # its class shows how weights are stored
        directory = pack_directory(directory, tmp_path / "packed")
    loaded = load_sparse(directory).eval()
    assert type(loaded) is type(model)
    weights = model.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    assert all(value.equal(weights[key]) for key, value in loaded.state_dict().items())
    masks = SparsityHandle.of(model).masks()
    assert masks.keys() == SparsityHandle.of(loaded).masks().keys()
    assert all(mask.equal(masks[layer]) for layer, mask in SparsityHandle.of(loaded).masks().items())
    with torch.no_grad():
        assert loaded(IDS)[0].equal(model(IDS)[0])


def change_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != ""}))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["Nobody"]}, r"class Nobody \(model_type 'llama'\)"),
        ({"architectures": ["AutoModelForCausalLM"]}, "class AutoModelForCausalLM"),
        ({"architectures": ["Trainer"]}, "class Trainer"),
        ({"architectures": ["os.system"]}, "class os.system"),
        ({"architectures": []}, "config.json does not say in `architectures`"),
        ({"architectures": ""}, "config.json does not say in `architectures`"),
        ({"architectures": [["LlamaForCausalLM"]]}, "config.json names the class"),
        ({"architectures": ["LlamaForTokenClassification"]}, r"has no weights for \['score.bias', 'score.weight'\]"),
        ({"architectures": ["LlamaModel"]}, r"unexpected weights, \['lm_head.weight'\] of a LlamaModel"),
        ({"num_hidden_layers": 1}, "model.layers.1|masks"),
    ],
)
def test_a_config_of_another_model(tmp_path, changes, words, packed):
    export_sparse(sparse_llama(), tmp_path, packed=packed)
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=words) as refusal:
        load_sparse(tmp_path)
    assert str(tmp_path) in str(refusal.value)


def test_a_key_that_is_left_over(tmp_path):
    export_sparse(sparse_llama(), tmp_path)
    (tmp_path / "weights_checksums.json").unlink()
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.another.weight": torch.ones(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected weights, \['model.another.weight'\]"):
        load_sparse(tmp_path)


CODE = """
from transformers import LlamaForCausalLM
class RemoteForCausalLM(LlamaForCausalLM):
    ran = True
"""


def test_code_in_the_directory_runs_only_where_it_is_trusted(tmp_path):
    export_sparse(sparse_llama(), tmp_path)
    (tmp_path / "modeling_remote.py").write_text(CODE)
    auto = {"AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM"}
    change_config(tmp_path, auto_map=auto, architectures=["RemoteForCausalLM"])
    for options in ({}, {"trust_remote_code": False}):
        with pytest.raises(ValueError, match="class RemoteForCausalLM .* pass trust_remote_code=True"):
            load_sparse(tmp_path, **options)
    loaded = load_sparse(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "RemoteForCausalLM"
    assert loaded.ran
    assert SparsityHandle.of(loaded).links() == SparsityHandle.of(sparse_llama()).links()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("option", ["quantization_config", "load_in_8bit", "load_in_4bit"])
def test_quantized_loading_is_refused(tmp_path, option, packed):
    export_sparse(sparse_llama(), tmp_path, packed=packed)
    with pytest.raises(ValueError, match=f"load_sparse got {option}"):
        load_sparse(tmp_path, **{option: {"quant_method": "torchao"} if "config" in option else True})
    load_sparse(tmp_path, **{option: None if "config" in option else False})


def test_quantized_models_are_not_exported(tmp_path):
    class Quantized(torch.Tensor):
        pass

    model = tiny_llama()
    sparsify(model, SparsityConfig(target_modules=["q_proj"]))
    layer = model.get_submodule("model.layers.1.mlp.up_proj")  # dense
    plain = layer.weight
    layer.weight = torch.nn.Parameter(plain.detach().as_subclass(Quantized))
    for packed in (False, True):
        with pytest.raises(
            ValueError, match=r"model.layers.1.mlp.up_proj.weight is of the class Quantized \(test_load"
        ):
            export_sparse(model, tmp_path / "x", packed=packed)
    layer.weight = plain
    model.config.quantization_config = {"quant_method": "torchao"}  # such an export would be refused by load_sparse
    with pytest.raises(ValueError, match="the config of the model has a quantization_config"):
        export_sparse(model, tmp_path / "x")
    assert not any(tmp_path.iterdir())
    del model.config.quantization_config
    load_sparse(export_sparse(model, tmp_path / "x"))


@pytest.mark.parametrize("storage", ["masked", "links"])
def test_a_run_of_another_sparsity_does_not_go_on_with_the_links(tmp_path, storage):
    export_sparse(made(LlamaForCausalLM), tmp_path)
    for sparsity in (0.4, 0.8):
        config = SparsityConfig(method="set", sparsity=sparsity, storage=storage)
        with pytest.raises(ValueError, match=rf"is 50.00% sparse, and this run {100 * sparsity:.2f}%"):
            load_sparse(tmp_path, sparsity=config)
    for config in (SparsityConfig("chtss", sparsity=0.8, storage=storage), SparsityConfig("static", sparsity=0.8)):
        assert SparsityHandle.of(load_sparse(tmp_path, sparsity=config)).sparsity() == pytest.approx(0.5, abs=1e-3)

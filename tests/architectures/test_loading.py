"""load_sparse: the class that was exported, weights that fit their masks, and no code from the directory."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_architectures import ARCHITECTURES
from transformers import LlamaForSequenceClassification, MarianForCausalLM

from hf_chts import SparsityConfig, SparsityHandle, export_sparse, load_sparse, sparsify
from hf_chts.export.auto_class import class_to_load

CONFIG = SparsityConfig(method="set", sparsity=0.5)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("MarianForCausalLM", "AutoModelForCausalLM"),
        ("MarianMTModel", "AutoModelForSeq2SeqLM"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("BertForMaskedLM", "AutoModelForMaskedLM"),
        ("LlamaForSequenceClassification", "AutoModelForSequenceClassification"),
        ("MyOwnModel", "AutoModelForCausalLM"),
        (None, "AutoModelForCausalLM"),
    ],
)
def test_the_class_that_a_model_card_shows(architecture, expected):
    assert class_to_load(architecture) == expected


def test_one_config_class_several_models(tmp_path):
    config = ARCHITECTURES["marian"].model().config
    decoder = MarianForCausalLM(config)
    sparsify(decoder, CONFIG)
    export_sparse(decoder, tmp_path / "decoder")
    assert type(load_sparse(tmp_path / "decoder")) is MarianForCausalLM
    classifier = LlamaForSequenceClassification(ARCHITECTURES["llama"].model().config)
    sparsify(classifier, CONFIG)
    export_sparse(classifier, tmp_path / "classifier")
    loaded = load_sparse(tmp_path / "classifier")
    assert type(loaded) is LlamaForSequenceClassification
    assert loaded.score.weight.equal(classifier.score.weight)
    assert "\npipeline_tag: text-classification\n" in (tmp_path / "classifier/README.md").read_text()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_code_in_the_directory_is_not_run(tmp_path, name):
    model = ARCHITECTURES[name].model()
    sparsify(model, CONFIG)
    export_sparse(model, tmp_path)
    kind = type(model).__name__
    loader = ARCHITECTURES[name].loader.__name__
    (tmp_path / "modeling_mine.py").write_text(f'open({str(tmp_path / "ran")!r}, "w")\nclass {kind}: pass\n')
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {loader: f"modeling_mine.{kind}"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(load_sparse(tmp_path)) is type(model)
    assert not (tmp_path / "ran").exists()


def test_a_transposed_weight_off_its_mask(tmp_path):
    model = ARCHITECTURES["gpt2"].model()
    sparsify(model, CONFIG)
    layer = SparsityHandle.of(model).layers["transformer.h.1.attn.c_proj"]  # square: only its orientation can be wrong
    export_sparse(model, tmp_path)
    load_sparse(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "transformer.h.1.attn.c_proj.weight"
    stray = tensors[key].clone()
    stray[tuple((~layer.mask & layer.topology).nonzero()[0])] = 1.0  # no link, though its mirror image is one
    save_file(tensors | {key: stray}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "weights_checksums.json").unlink()  # which would tell first
    with pytest.raises(ValueError, match="transformer.h.1.attn.c_proj has weights off its mask"):
        load_sparse(tmp_path)


def test_the_model_card_has_out_by_in(tmp_path):
    model = ARCHITECTURES["gpt2"].model()
    sparsify(model, CONFIG)
    assert "| `c_fc` | 2 | 22 × 18 | 396 | 50.00% |" in (export_sparse(model, tmp_path) / "README.md").read_text()


def test_tensors_keep_their_keys(tmp_path):
    model = ARCHITECTURES["gpt2"].model()
    keys = set(model.state_dict())
    sparsify(model, CONFIG)
    assert set(model.state_dict()) == keys
    stored = load_file(export_sparse(model, tmp_path) / "model.safetensors")
    assert set(stored) <= keys
    assert stored["transformer.h.0.attn.c_attn.weight"].shape == torch.Size([18, 54])

"""load_sparse: the class that was exported, weights that fit their masks, and no code from the directory."""

import pytest
from safetensors.torch import load_file, save_file
from tiny_architectures import ARCHITECTURES

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
    (tmp_path / "weights_checksums.json").unlink()  # which would be refused first
    with pytest.raises(ValueError, match="transformer.h.1.attn.c_proj has weights off its mask"):
        load_sparse(tmp_path)


def test_the_model_card_has_out_by_in(tmp_path):
    model = ARCHITECTURES["gpt2"].model()
    sparsify(model, CONFIG)
    assert "| `c_fc` | 2 | 22 × 18 | 396 | 50.00% |" in (export_sparse(model, tmp_path) / "README.md").read_text()

"""An export is a plain Hugging Face directory. (test_hub_push.py loads one without hf_chts.)"""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import tiny_llama

from hf_chts import SparsityConfig, SparsityHandle, export_sparse, sparsify


def sparse_llama(**changes):
    model = tiny_llama(**changes)
    sparsify(model, SparsityConfig())
    return model.eval()


def test_what_is_written(tmp_path):
    model = sparse_llama()
    directory = export_sparse(model, tmp_path / "a/b", training={"seed": 3}, metrics={"bits_per_byte": 1.25})
    names = {path.name for path in directory.iterdir()}
    assert {"config.json", "model.safetensors", "sparsity_config.json", "masks.safetensors", "README.md"} <= names
    tensors = load_file(directory / "model.safetensors")
    for name, layer in SparsityHandle.of(model).layers.items():
        weight = tensors[f"{name}.weight"]
        assert int(torch.count_nonzero(weight)) == layer.links
        assert weight.view(torch.int32)[~layer.mask].eq(0).all()  # +0.0, not -0.0
    assert not [name for name in tensors if "mask" in name]
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    assert SparsityConfig.load(directory) == SparsityHandle.of(model).config
    card = ModelCard.load(directory / "README.md")
    assert {"hf_chts", "sparse", "chtss"} <= set(card.data.tags)
    assert card.data.library_name == "transformers"
    assert "| `q_proj` | 2 | 40 × 40 | 1,600 | 50.00% |" in card.text
    assert "| all sparse layers | 14 | | 13,600 | 50.00% |" in card.text
    assert "| seed | 3 |" in card.text
    assert "| bits_per_byte | 1.25 |" in card.text


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="the model is not sparse: call sparsify"):
        export_sparse(tiny_llama(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="is a file: export to a directory"):
        export_sparse(sparse_llama(), file)
    stray = sparse_llama()
    layer = next(iter(SparsityHandle.of(stray).layers.values()))
    with torch.no_grad():
        layer.weight.fill_(1)
    with pytest.raises(RuntimeError, match="is not 0 off its mask"):
        export_sparse(stray, tmp_path / "y")
    assert not (tmp_path / "y").exists()

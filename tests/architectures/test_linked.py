"""Models whose layers keep their links in slots: trained, exported and loaded as with masks, bit for bit."""

import pytest
from architecture import outputs, same
from architecture_trainer import trainer
from safetensors.torch import load_file
from tiny_architectures import ARCHITECTURES

from hf_chts import SparsityHandle, export_sparse, load_sparse

# Conv1D, own classes of layers, weights used elsewhere or stored in other pieces, ties, an output that is written to
NAMES = [
    *("llama", "gpt2", "gpt_neox", "falcon", "t5", "mamba", "mixtral", "qwen3_moe", "swin", "vit", "llava"),
    *("deberta, tokens", "wav2vec2", "bert, masked"),
]


def tensors(directory):
    return {
        path.name: {key: value for key, value in load_file(path).items() if not path.name.startswith("masks")}
        for path in sorted(directory.glob("*.safetensors"))
    }


@pytest.mark.parametrize("name", NAMES)
def test_as_with_masks(tmp_path, name):
    runs = {}
    for storage in ("masked", "links"):
        config = {"storage": storage}
        runs[storage] = trainer(name, tmp_path / storage, config=config, max_grad_norm=0.0, optim="adamw_torch")
        runs[storage].train()
    batch = ARCHITECTURES[name].batch(2, seed=99)
    live = outputs(runs["links"].model, batch)
    assert same(outputs(runs["masked"].model, batch), live)
    masks = runs["links"].sparse.masks()
    assert all(mask.equal(masks[layer]) for layer, mask in runs["masked"].sparse.masks().items())
    for packed in (False, True):
        found = [
            tensors(export_sparse(runs[storage].model, tmp_path / f"{storage} {packed}", packed=packed))
            for storage in runs
        ]
        assert found[0].keys() == found[1].keys()
        for file, expected in found[0].items():
            assert found[1][file].keys() == expected.keys()
            assert all(found[1][file][key].equal(value) for key, value in expected.items())
        again = load_sparse(tmp_path / f"links {packed}")
        assert SparsityHandle.of(again).config.storage == "links"
        assert same(outputs(again, batch), live)

"""The weights that links start with."""

import math

import pytest
import torch
from cases import trainer
from tiny import tiny_llama
from torch import nn

from hf_chts import SparsityConfig, sparsify

STORAGES = ["masked", "links"]


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 200))


def made(storage="masked", initial_weights="swi", sparsity=0.95, seed=0):
    model = layers()
    config = SparsityConfig(
        "set", sparsity=sparsity, target_modules=["0", "1"], storage=storage, initial_weights=initial_weights,
        topology_seed=seed,
    )  # fmt: skip
    return model, sparsify(model, config)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("kind", "share"), [("swi", 0.05), ("kaiming", 1.0)])
def test_the_deviation_is_that_of_the_links_or_of_the_dense_layer(storage, kind, share):
    model, sparse = made(storage, kind)
    for name, fan_in in (("0", 300), ("1", 400)):
        layer = sparse.layers[name]
        values = layer.weight.detach()[layer.topology]
        expected = math.sqrt(2 / (share * fan_in))
        assert len(values) == layer.links
        # of 6,000 and 4,000 normal numbers, four standard errors
        assert values.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * len(values)))
        assert abs(values.mean().item()) < 4 * expected / math.sqrt(len(values))
    sparse.check()
    dense = layers()
    assert model[0].bias.equal(dense[0].bias)


def test_they_depend_on_the_topologys_seed_alone():
    weights = [made(storage)[1].layers["0"].weight.detach() for storage in STORAGES]
    assert weights[0].equal(weights[1])
    torch.manual_seed(5)
    assert made()[1].layers["0"].weight.equal(weights[0])
    assert not made(seed=1)[1].layers["0"].weight.equal(weights[0])


@pytest.mark.parametrize("storage", STORAGES)
def test_a_model_that_has_its_topology_keeps_its_weights(storage):
    _, sparse = made(storage)
    masks = {name: mask.clone() for name, mask in sparse.masks().items()}
    model = layers()
    before = model[0].weight.detach().clone()
    again = sparsify(model, sparse.config, masks=masks)
    assert again.layers["0"].weight.detach().equal(before * masks["0"])


def test_the_signal_of_relu_layers_keeps_its_size():
    torch.manual_seed(0)
    model = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(512, 512, bias=False), nn.ReLU())])
    targets = ["0", "2", "4", "6"]
    sparsify(model, SparsityConfig("set", sparsity=0.98, target_modules=targets, initial_weights="swi"))
    x = torch.randn(256, 512)
    # ReLU halves the mean square, and the weights double it
    assert model(x).square().mean().item() == pytest.approx(x.square().mean().item(), rel=0.4)


def test_weights_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ValueError, match="initial_weights 'swi' gives links values"):
        sparsify(model, SparsityConfig("set", storage="links", initial_weights="swi"))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_run_resumes_bit_for_bit(tmp_path, storage):
    config = {"initial_weights": "swi"}
    whole = trainer(tmp_path / "whole", storage=storage, config=config)
    whole.train()
    cut = trainer(tmp_path / "cut", storage=storage, config=config)
    cut.train()
    again = trainer(tmp_path / "cut", storage=storage, config=config)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-10"))
    for name, value in whole.model.state_dict().items():
        assert value.equal(again.model.state_dict()[name]), name

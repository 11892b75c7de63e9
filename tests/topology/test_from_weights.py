"""Topologies read off weights: what they keep, worked out by hand or by sorting, and with which calibration inputs."""

import pytest
import torch
from cases import Invariants, case_config, trainer
from tiny import tiny_llama
from torch import nn

from hf_chts import SparsityConfig, sparsify
from hf_chts.layers.calibration import input_norms
from hf_chts.topology.parts import INITIAL_TOPOLOGIES
from hf_chts.topology.patterns import highest

STORAGES = ("masked", "links")
IDS = torch.arange(48).view(3, 16)


def chosen(name, weight, links, **more):
    """The mask of a part on a weight given as rows."""
    given = {"weight": torch.tensor(weight), "choose": highest(None, links, torch.Generator().manual_seed(0)), **more}
    return INITIAL_TOPOLOGIES[name](SparsityConfig(), **given).int().tolist()


def test_by_hand():
    weight = [[4.0, -3.0, 0.1], [0.2, 0.3, -0.1]]
    assert chosen("magnitude", weight, 3) == [[1, 1, 0], [0, 1, 0]]
    # shares of row and column: 0.56 + 0.95, 0.42 + 0.91, 0.01 + 0.5; 0.33 + 0.05, 0.5 + 0.09, 0.17 + 0.5
    assert chosen("relative_importance", weight, 3) == [[1, 1, 0], [0, 0, 1]]
    # times 1, 1, 100, the best of each output, the first of which gets what does not divide
    norms = torch.tensor([1.0, 1.0, 100.0])
    assert chosen("wanda", weight, 3, input_norms=norms) == [[1, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize("name", ["magnitude", "relative_importance", "wanda"])
def test_what_has_no_weight_comes_last_and_at_random(name):
    weight = torch.zeros(6, 10)
    weight[:, 3] = -1.0
    given = {"weight": weight, "input_norms": torch.ones(10)}
    masks = [
        INITIAL_TOPOLOGIES[name](
            SparsityConfig(), choose=highest(None, 18, torch.Generator().manual_seed(seed)), **given
        )
        for seed in (0, 0, 1)
    ]
    assert masks[0][:, 3].all()
    assert int(masks[0].sum()) == 18
    assert masks[0].equal(masks[1])
    assert not masks[0].equal(masks[2])


def inputs_of(model, ids=IDS):
    """What comes to each target layer, caught by hand: (tokens, in) by name."""
    caught = {}

    def catch(name):
        return lambda layer, args: caught.setdefault(name, []).append(args[0].detach().flatten(0, -2))

    targets = sparsify(tiny_llama(), SparsityConfig()).layers
    hooks = [model.get_submodule(name).register_forward_pre_hook(catch(name)) for name in targets]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in caught.items()}


def test_norms_of_inputs():
    model = tiny_llama().train()
    layers = {name: model.get_submodule(name) for name in inputs_of(model)}
    norms = input_norms(model, layers, [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:]}])
    assert model.training
    for name, inputs in inputs_of(model).items():
        torch.testing.assert_close(norms[name], inputs.norm(dim=0))
    assert not any(layer._forward_pre_hooks for layer in layers.values())
    # padding does not count
    mask = torch.ones_like(IDS)
    mask[1:] = 0
    alone = input_norms(model, layers, [{"input_ids": IDS[:1]}])
    for name, found in input_norms(model, layers, [{"input_ids": IDS, "attention_mask": mask}]).items():
        torch.testing.assert_close(found, alone[name])
    with pytest.raises(ValueError, match="no calibration input has come to another: take more"):
        input_norms(model, {"another": nn.Linear(2, 2)}, [{"input_ids": IDS}])


@pytest.mark.parametrize("allocation", ["uniform", "erdos_renyi", "global"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_model_is_pruned_by_what_its_layers_see(storage, allocation):
    config = SparsityConfig(
        "chts", sparsity=0.8, initial_topology="wanda", storage=storage, allocation=allocation, per_head=True
    )
    model = tiny_llama()
    inputs = inputs_of(model)
    before = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in inputs}
    sparse = sparsify(model, config, calibration=inputs)
    possible = sum(weight.numel() for weight in before.values())
    assert sparse.links() == round(possible * 0.2)
    for name, layer in sparse.layers.items():
        mask = layer.topology
        assert layer.weight.equal(before[name] * mask), name
        scores = before[name].abs() * inputs[name].norm(dim=0)
        for row, links in zip(scores, mask, strict=True):
            assert row[links].min() >= row[~links].max() * (1 - 1e-6)
    same = sparsify(tiny_llama(), config, calibration={name: x.norm(dim=0) for name, x in inputs.items()})
    assert all(mask.equal(sparse.masks()[name]) for name, mask in same.masks().items())


def test_calibration_that_does_not_fit_is_refused_before_anything_changes():
    config = SparsityConfig("set", initial_topology="wanda", target_modules=["q_proj", "k_proj"])
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for calibration, named in {
        "nothing": (None, r"inputs \(samples, 40\) or their norms \(40,\) for model.layers.0.*, got nothing"),
        "another width": (torch.ones(3, 41), r"got \(3, 41\)"),
        "no number": (torch.full((3, 40), torch.nan), "must be finite"),
        "nothing but 0": (torch.zeros(3, 40), "not all 0"),
    }.values():
        with pytest.raises(ValueError, match=named):
            sparsify(model, config, calibration=calibration)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    # one tensor for all layers, that have as many inputs
    torch.manual_seed(0)
    sparse = sparsify(model, config, calibration=torch.randn(3, 40))
    assert sparse.sparsity() == pytest.approx(0.9)


def test_weights_that_are_not_finite_are_named():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj: scores must be finite"):
        sparsify(model, SparsityConfig("set", initial_topology="magnitude"))


def test_new_weights_and_weights_without_data_are_refused():
    with pytest.raises(ValueError, match="initial_weights is 'swi', which would overwrite the weights"):
        SparsityConfig("set", initial_topology="magnitude", initial_weights="swi")
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ValueError, match="'magnitude' chooses links by their weights: give the model its weights"):
        sparsify(model, SparsityConfig("set", initial_topology="magnitude", storage="links"))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_run_from_calibrated_links(tmp_path, storage):
    config = {"storage": storage, "initial_topology": "wanda"}
    model = tiny_llama()
    sparsify(model, case_config("chts", **config), calibration=inputs_of(model))
    run = trainer(tmp_path, "chts", model=model, config=config)
    invariants = Invariants.watch(run)
    run.train()
    assert invariants.updates >= 4

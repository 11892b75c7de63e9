"""Layers whose weight something else holds are refused, by their name and that of what holds it."""

import copy

import pytest
import torch
from cases import arguments, case_config, trainer
from tiny import tiny_llama
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import TrainerCallback

from hf_chts import MaskedLinear, SparseModel, SparseTrainer, SparsityConfig, export_sparse, sparsify

NAME = "model.layers.1.mlp.up_proj"


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def old(function):
    def hold(layer):
        with pytest.warns(FutureWarning, match="deprecated"):
            function(layer)

    return hold


# how the weight of a layer is taken hold of, what the refusal calls it, and what it says to call
HOLDERS = {
    "parametrize": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Halved()),
        r"parametrize \(Halved\)",
        r"remove_parametrizations\(layer, 'weight'\)",
    ),
    "new weight_norm": (parametrizations.weight_norm, "_WeightNorm", r"remove_parametrizations\(layer, 'weight'\)"),
    "orthogonal": (parametrizations.orthogonal, "_Orthogonal", r"remove_parametrizations\(layer, 'weight'\)"),
    "prune": (
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        r"prune \(L1Unstructured\)",
        r"prune\.remove\(layer, 'weight'\)",
    ),
    "twice pruned": (
        lambda layer: [prune.random_unstructured(layer, "weight", amount=0.1) for _ in range(2)],
        r"prune \(PruningContainer\)",
        r"prune\.remove\(layer, 'weight'\)",
    ),
    "old weight_norm": (old(nn.utils.weight_norm), "weight_norm", r"remove_weight_norm\(layer, 'weight'\)"),
    "old spectral_norm": (nn.utils.spectral_norm, "spectral_norm", r"remove_spectral_norm\(layer, 'weight'\)"),
}


@pytest.fixture(params=HOLDERS)
def holder(request):
    hold, *words = HOLDERS[request.param]
    return hold, f"{words[0]}.* holds the weight of {NAME} .*{words[1]}"


def test_before_the_model_is_made_sparse(holder):
    hold, message = holder
    model = tiny_llama()
    hold(model.get_submodule(NAME))
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        sparsify(model, SparsityConfig())
    assert SparseModel.of(model) is None
    assert [type(module) for module in model.modules()] == kinds
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    # what is left dense may be held by anything
    sparsify(model, SparsityConfig(target_modules=["q_proj"]))


def test_afterwards(holder, tmp_path):
    hold, message = holder
    run = trainer(tmp_path, "set", save_strategy="no")
    hold(run.model.get_submodule(NAME))
    for use in (run.train, run.sparse.check, run.sparse.unsparsify, lambda: export_sparse(run.model, tmp_path / "x")):
        with pytest.raises(ValueError, match=message):
            use()
    assert not (tmp_path / "x").exists()
    masked = [m for m in run.model.modules() if hasattr(m, "mask")]
    assert len(masked) == 14  # none was reverted


def test_in_the_middle_of_training(tmp_path):
    class Prune(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                prune.l1_unstructured(model.get_submodule(NAME), "weight", amount=0.5)

    run = SparseTrainer(
        model=tiny_llama(),
        args=arguments(tmp_path, save_strategy="no"),
        sparsity=case_config("set"),
        train_dataset=[{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8,
        callbacks=[Prune()],
    )
    with pytest.raises(ValueError, match=rf"prune .* holds the weight of {NAME}"):
        run.train()
    assert run.state.global_step == 8  # the next update


def test_a_held_bias_and_a_layer_by_itself():
    layer = nn.Linear(4, 3)
    prune.l1_unstructured(layer, "bias", amount=1)
    with pytest.raises(ValueError, match=r"prune .* holds the bias of the layer .*remove\(layer, 'bias'\)"):
        MaskedLinear.convert(layer, torch.ones(3, 4, dtype=torch.bool))
    prune.remove(layer, "bias")
    MaskedLinear.convert(layer, torch.ones(3, 4, dtype=torch.bool))


def test_when_it_is_removed_again_all_goes_on(tmp_path):
    run = trainer(tmp_path, "set", save_strategy="no")
    layer = run.model.get_submodule(NAME)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    prune.remove(layer, "weight")
    run.train()
    run.sparse.check()

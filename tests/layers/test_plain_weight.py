"""Layers whose weight something else holds, or that is no plain tensor, are refused by name; nothing is half done."""

import copy

import pytest
import torch
from cases import arguments, case_config, trainer
from tiny import tiny_llama
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import TrainerCallback

from hf_chts import MaskedLinear, SparseTrainer, SparsityConfig, SparsityHandle, export_sparse, sparsify
from hf_chts.layers import conversion

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
    assert SparsityHandle.of(model) is None
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


class Quantized(torch.Tensor):
    """A weight as libraries of quantization make it: a tensor of their own, that knows few operations."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.detach, torch.ops.aten.alias):
            return quantized(args[0].stored)
        raise NotImplementedError(f"{cls.__name__} does not know {function}")


def quantized(stored):
    tensor = torch.Tensor._make_wrapper_subclass(Quantized, stored.shape, dtype=torch.float32)
    tensor.stored = stored
    return tensor


def quantize(layer, trains=False):
    layer.weight = nn.Parameter(quantized(layer.weight.detach().round().to(torch.int8)), requires_grad=trains)


def of_integers(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)


QUANTIZED = {
    "for training": (lambda layer: quantize(layer, trains=True), "of the class Quantized"),
    "weights alone": (quantize, "of the class Quantized"),
    "integers": (of_integers, "stored as int8"),
    "float8": (
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn))),
        "stored as float8_e4m3fn",
    ),
}


@pytest.fixture(params=QUANTIZED)
def quantization(request):
    make, words = QUANTIZED[request.param]
    return make, f"the weight of {NAME} is {words}"


def everything(model):
    """Classes, buffers, hooks and weights of a model; of quantized ones, which tensors they are."""
    modules = {name: (type(m), dict(m._buffers), vars(m).keys()) for name, m in model.named_modules()}
    hooks = {name: dict(p._backward_hooks or {}) for name, p in model.named_parameters()}
    return modules, hooks, {name: (id(p), p._version) for name, p in model.named_parameters() if type(p) is Quantized}


def same_weights(model, before):
    plain = {name: p for name, p in model.named_parameters() if type(p) is nn.Parameter}
    return all(p is before[name] or p.equal(before[name]) for name, p in plain.items())


def test_quantized_before_the_model_is_made_sparse(quantization):
    make, message = quantization
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make(model.get_submodule(NAME))
    before[f"{NAME}.weight"] = model.get_submodule(NAME).weight
    was = everything(model)
    with pytest.raises(ValueError, match=message) as refusal:
        sparsify(model, SparsityConfig())
    assert "frozen" not in str(refusal.value)
    assert everything(model) == was
    assert same_weights(model, before)
    assert SparsityHandle.of(model) is None
    sparsify(model, SparsityConfig(exclude_modules=[NAME]))


def test_quantized_afterwards(quantization, tmp_path):
    make, message = quantization
    run = trainer(tmp_path, "set", save_strategy="no")
    make(run.model.get_submodule(NAME))
    for use in (run.train, run.sparse.check, run.sparse.unsparsify):
        with pytest.raises(ValueError, match=message):
            use()
    with pytest.raises(ValueError, match=NAME):
        export_sparse(run.model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_layer_that_another_has_taken_the_place_of(tmp_path):
    class Float8Linear(nn.Linear):
        pass

    run = trainer(tmp_path, "set", save_strategy="no")
    old = run.model.get_submodule(NAME)
    run.model.set_submodule(NAME, Float8Linear(old.in_features, old.out_features, bias=False))
    for use in (run.train, run.sparse.check, lambda: export_sparse(run.model, tmp_path / "x")):
        with pytest.raises(ValueError, match=f"{NAME} is no longer in the model: a Float8Linear is in its place"):
            use()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("step", ["mask_by_hook", "register_buffer", "held_part"])
def test_whatever_fails_in_the_conversion_the_model_is_as_it_was(monkeypatch, step):
    calls = []

    def fail_the_fifth_time(function):
        def call(*args, **kwargs):
            calls.append(step)
            if len(calls) == 5:
                raise MemoryError("no room")
            return function(*args, **kwargs)

        return call

    model = tiny_llama()
    was, before = everything(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    owner = {"held_part": conversion, "register_buffer": nn.Linear}.get(step, MaskedLinear)
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, fail_the_fifth_time(getattr(owner, step)))
        with pytest.raises(MemoryError):
            sparsify(model, SparsityConfig())
    assert everything(model) == was
    assert same_weights(model, before)
    assert SparsityHandle.of(model) is None
    assert sparsify(model, SparsityConfig()).sparsity() == 0.5

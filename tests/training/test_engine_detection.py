"""engine_of: the engines that it recognizes without a launcher, and the set-ups that it refuses."""

import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Adafactor

from hf_chts import MaskedLinear
from hf_chts.layers.links import check_zeros
from hf_chts.sharding.detect import engine_of
from hf_chts.sharding.replicated import ReplicatedWeights


def layers_of(model):
    return {"0": MaskedLinear.convert(model[0], torch.rand(5, 7) < 0.5)}


def test_one_process_with_an_optimizer_that_accelerate_wraps():
    model = nn.Sequential(nn.Linear(7, 5))
    layers = layers_of(model)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = engine_of(model, layers, Accelerator(cpu=True).prepare(optimizer))
    assert isinstance(engine, ReplicatedWeights)
    assert engine.optimizer is optimizer
    check_zeros(layers, engine)
    with torch.no_grad():
        layers["0"].weight.fill_(1)
    with pytest.raises(RuntimeError, match="0 is not 0 off its mask.*weight"):
        check_zeros(layers, engine)


@pytest.mark.parametrize("name", ["LBFGS", "AdamW8bit", "GaLoreAdamW", "OnebitAdam"])
def test_optimizers_that_cannot_keep_links_missing_are_refused(name):
    model = nn.Sequential(nn.Linear(7, 5, bias=False))
    layers = layers_of(model)
    optimizer = type(name, (torch.optim.SGD,), {})(model.parameters())
    with pytest.raises(ValueError, match=f"{name} cannot be used.*AdamW"):
        engine_of(model, layers, optimizer)


@pytest.mark.parametrize(
    ("make", "mixing"),
    [(Adafactor, True), (torch.optim.Muon, True), (torch.optim.SGD, False), (torch.optim.Adam, False)],
)
def test_optimizers_that_mix_entries_are_told(make, mixing):
    model = nn.Sequential(nn.Linear(7, 5, bias=False))
    assert engine_of(model, layers_of(model), make(model.parameters())).moves_missing_links == mixing


def test_state_that_is_not_elementwise_is_refused_where_it_is_found():
    model = nn.Sequential(nn.Linear(7, 5))
    layers = layers_of(model)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[layers["0"].weight] = {"step": torch.tensor(1.0), "exp_avg_sq_row": torch.ones(5)}
    with pytest.raises(TypeError, match="exp_avg_sq_row"):
        check_zeros(layers, engine_of(model, layers, optimizer))


def test_fsdp1_and_unknown_layouts_are_refused():
    model = nn.Sequential(nn.Linear(7, 5))
    layers = layers_of(model)
    optimizer = torch.optim.AdamW(model.parameters())
    layers["0"].weight._fsdp_flattened = True  # as FSDP1 marks it
    with pytest.raises(ValueError, match="FSDP1 holds 0.*fsdp_version"):
        engine_of(model, layers, optimizer)
    layers["0"].weight = nn.Parameter(torch.zeros(35))
    with pytest.raises(ValueError, match="0 has a weight of .35,. where .5, 7. is expected"):
        engine_of(model, layers, optimizer)


def test_other_optimizers_of_deepspeed_are_refused():
    class FP16_Optimizer:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])

    FP16_Optimizer.__module__ = "deepspeed.runtime.fp16.fused_optimizer"
    model = nn.Sequential(nn.Linear(7, 5))
    with pytest.raises(ValueError, match="FP16_Optimizer.*ZeRO stage 1, 2 or 3"):
        engine_of(model, layers_of(model), FP16_Optimizer())


def test_deepspeed_is_not_imported_where_it_is_not_used():
    code = "import sys, hf_chts.sharding; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

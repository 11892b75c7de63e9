"""Sharing layers out over ranks, and zeroing what a new topology leaves behind."""

import torch
from torch import nn

from hf_chts import MaskedLinear, SparsityConfig
from hf_chts.evolution.update import update_cost
from hf_chts.sharding.ranks import share_out
from hf_chts.sharding.replicated import ReplicatedWeights


def test_dearest_first_to_the_least_loaded():
    owner = share_out({"a": 3.0, "b": 5.0, "c": 4.0, "d": 1.0, "e": 1.0}, 2)
    assert owner == {"b": 0, "c": 1, "a": 1, "d": 0, "e": 0}
    assert set(share_out({"a": 1.0, "b": 1.0}, 1).values()) == {0}
    assert share_out({"a": 1.0, "b": 1.0, "c": 1.0}, 8) == {"a": 0, "b": 1, "c": 2}


def test_llama_60m_is_balanced():
    shapes = {}
    for block in range(8):
        shapes |= {f"{block}.{p}": (512, 512) for p in "qkvo"}
        shapes |= {f"{block}.gate": (1376, 512), f"{block}.up": (1376, 512), f"{block}.down": (512, 1376)}
    for choice in ("soft", "hard"):
        costs = {
            name: update_cost(shape, SparsityConfig("chts", regrowth_choice=choice)) for name, shape in shapes.items()
        }
        for ranks in (2, 3, 8):
            owner = share_out(costs, ranks)
            loads = [sum(costs[n] for n in costs if owner[n] == rank) for rank in range(ranks)]
            assert max(loads) < 1.05 * sum(loads) / ranks


def test_weight_gradient_and_moments_of_links_that_go_become_0():
    torch.manual_seed(0)
    mask = torch.rand(5, 7) < 0.5
    layer = MaskedLinear.convert(nn.Linear(7, 5), mask)
    optimizer = torch.optim.AdamW(layer.parameters(), amsgrad=True)
    layer(torch.randn(3, 7)).square().sum().backward()
    optimizer.step()
    new = mask.clone()
    gone, come = mask.nonzero()[:3], (~mask).nonzero()[:3]
    new[tuple(gone.t())], new[tuple(come.t())] = False, True
    state = optimizer.state[layer.weight]
    before = {key: state[key].clone() for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    weight = layer.weight.detach().clone()
    layer.storage.replace(layer.matrix(new), ReplicatedWeights(optimizer))
    stayed = mask & new
    assert layer.mask.equal(new)
    for key, tensor in [("weight", layer.weight), ("grad", layer.weight.grad), *((k, state[k]) for k in before)]:
        old = {"weight": weight, **before}.get(key)
        assert tensor[~stayed].eq(0).all(), key
        if old is not None:
            assert tensor[stayed].equal(old[stayed])
    assert state["step"] == 1

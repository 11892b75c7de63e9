"""How many operations an update of LLaMA-60M's 56 layers gives to a GPU, and how often the host waits for it.

Widths are small, which changes neither. The device is played on the CPU, without compiled loops.
"""

import pytest
import torch
from played_device import WAITS, Played, PlayedDevice, move
from tiny import random_blocks, tiny_llama

from hf_chts import SparsityConfig, finite, sparsify
from hf_chts.evolution.evolver import Evolver
from hf_chts.layers import plain_weight

LAUNCHES, HOST_WAITS = 2000, 50


def evolver_of(method):
    model = tiny_llama(
        hidden_size=64, intermediate_size=96, num_hidden_layers=8, use_cache=False, attn_implementation="eager"
    )
    settings = {"initial_sparsity": 0.8, "sparsity_schedule": "constant"} if method == "chtss" else {}
    config = SparsityConfig(method=method, sparsity=0.8, update_interval=1, drop_fraction=0.1, **settings)
    return model, Evolver(sparsify(model, config))


def trained(model, evolver):
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    evolver.begin(1000, optimizer)
    ids = torch.tensor(random_blocks(2)["input_ids"]).to(model.lm_head.weight.device)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        yield
        optimizer.zero_grad()


@pytest.mark.parametrize("method", ["chts", "chtss", "set", "rigl"])
def test_an_update_launches_little_and_hardly_waits(method, monkeypatch):
    monkeypatch.setattr(plain_weight, "own_class", lambda tensor: None)  # a GPU's tensors are of torch's own class
    monkeypatch.setattr(finite, "_has_no_values", lambda tensor: False)  # those of a meta device have none
    with PlayedDevice() as device:
        model, evolver = evolver_of(method)
        assert len(evolver.sparse.layers) == 56
        move(model)
        for _ in trained(model, evolver):
            device.launches.clear()
            WAITS.clear()
            assert evolver.step()["links_regrown"] > 0
        assert isinstance(next(iter(evolver.sparse.masks().values())), Played)
    assert 56 < sum(device.launches.values()) <= LAUNCHES, device.launches
    assert 0 < sum(WAITS.values()) <= HOST_WAITS, WAITS

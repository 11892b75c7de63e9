"""Whatever an update uses lives where its layer's links live, wherever the model was when it was made sparse."""

import pytest
import torch
from cases import INTERVAL, STEPS, VARIED, case_config
from played_device import MixedDevices, Played, PlayedDevice, move
from tiny import random_blocks, tiny_llama

from hf_chts import sparsify
from hf_chts.checkpoint import load_topology, save_topology
from hf_chts.evolution import update as update_module
from hf_chts.evolution.evolver import Evolver
from hf_chts.layers import plain_weight
from hf_chts.topology import random_streams


@pytest.fixture
def played(monkeypatch):
    # torch has no generator for the device; a GPU's numbers are others too
    monkeypatch.setattr(update_module, "generator_of", lambda seed, device: random_streams.generator_of(seed))
    monkeypatch.setattr(plain_weight, "own_class", lambda tensor: None)  # a GPU's tensors are of torch's own class
    with PlayedDevice() as device:
        yield device


def test_the_played_device_refuses_to_mix(played):
    here, there = torch.ones(3), Played(torch.ones(3))
    with pytest.raises(MixedDevices):
        here + there
    with pytest.raises(MixedDevices):
        there[here.bool()]
    with pytest.raises(MixedDevices):
        there.mul_(here)
    with pytest.raises((TypeError, RuntimeError)):
        there.numpy()
    assert (there + torch.tensor(1.0)).cpu().tolist() == [2, 2, 2]
    assert here.copy_(2 * there).tolist() == [2, 2, 2]
    assert torch.zeros(2, device=there.device).add_(1).tolist() == [1, 1]


def train(directory, case, place, *, resume=False):
    """Masks, stored weights and figures after 8 steps with 2 updates, on the CPU. Saves the topology after step 4, or
    resumes from there, with new weights and moments, which is enough to see on which device tensors are."""
    model = tiny_llama(use_cache=False, num_hidden_layers=1, num_attention_heads=2, attn_implementation="eager")
    sparse = sparsify(model, case_config(case))
    evolver = Evolver(sparse)
    first = 0
    if resume:
        state = load_topology(directory)
        evolver.restore(state)
        first = state.step
        for name, layer in sparse.layers.items():
            layer.set_mask(state.masks[name])
    place(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    evolver.begin(STEPS, optimizer, first)
    ids = torch.tensor(random_blocks(4)["input_ids"]).to(model.lm_head.weight.device)
    for step in range(first, 8):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        evolver.step()
        evolver.check()
        if step + 1 == 4 and not resume:
            save_topology(directory, evolver.state())
    state = evolver.state()
    figures = [{k: v for k, v in entry.items() if k != "topology_seconds"} for entry in state.history]
    return {name: mask.cpu() for name, mask in state.masks.items()}, figures


@pytest.mark.parametrize("case", VARIED)
def test_topologies_evolve_where_the_layers_are(case, played, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    masks, figures = train(there, case, move)
    expected, expected_figures = train(here, case, lambda model: model)
    assert len(figures) == 8 // INTERVAL
    assert figures == expected_figures
    assert all(mask.equal(expected[name]) for name, mask in masks.items())
    _, resumed = train(there, case, move, resume=True)
    assert [entry["step"] for entry in resumed] == [4, 8]

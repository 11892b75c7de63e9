"""The circuit of a prompt: its links are links of the model, between neurons that are active."""

import torch
from tiny import tiny_llama

from hf_chts import SparsityConfig, sparsify
from hf_chts.report.circuit import LINKS, NEURONS, trace


class Words:
    def __call__(self, text, return_tensors):
        return {"input_ids": torch.tensor([[len(word) for word in text.split()]])}

    def decode(self, ids):
        return f"<{ids[0]}>"


def test_links_of_active_neurons():
    model = tiny_llama(num_key_value_heads=2).eval()
    sparse = sparsify(model, SparsityConfig(method="topk", sparsity=0.9, initial_sparsity=0.8, activation_topk=0.25))
    seen = {}
    for name in sparse.layers:
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, x, name=name: seen.update({name: x[0][0].detach()})
        )
    found = trace(model, sparse, Words(), "a circuit of some words", step=7)
    assert list(found.parts.values()) == [40, 60, 40, 60]
    assert (found.channels, found.step) == (40, 7)
    assert found.links
    for link in found.links:
        layer = sparse.layers[link.layer]
        row = link.neuron if layer.storage.shape[0] != 20 else link.neuron // 20 * 10 + link.neuron % 10
        place = (row, link.channel) if link.reads else (link.channel, link.neuron)
        assert layer.mask[place]
        assert link.weight == round(layer.weight[place].item(), 6)
        if not link.reads:
            assert seen[link.layer][-1, link.neuron] != 0
    for part in found.parts:
        neurons = {link.neuron for link in found.links if link.layer.startswith(part)}
        assert len(neurons) <= min(NEURONS, found.active[part])
        per_layer = [(link.layer, link.neuron) for link in found.links]
        assert max(per_layer.count(one) for one in per_layer) <= LINKS

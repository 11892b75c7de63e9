"""What becomes of values, optimizer state and what is kept beside them when the links of a layer change, by hand."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_chts import MaskedConv1D, MaskedLinear
from hf_chts.layers.links import check_zeros
from hf_chts.sharding.replicated import ReplicatedWeights

OLD = torch.tensor([[1, 1, 0], [0, 1, 0]], dtype=torch.bool)
NEW = torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.bool)  # (0, 1) goes, (0, 2) comes


def layer_of(kind):
    plain = nn.Linear(3, 2, bias=False) if kind is MaskedLinear else Conv1D(2, 3)
    layer = kind.convert(plain, OLD)
    optimizer = torch.optim.AdamW([layer.weight], lr=0.0)
    layer.weight.grad = layer.matrix(torch.ones(2, 3)) * layer.mask
    optimizer.step()
    with torch.no_grad():
        layer.weight.copy_(layer.matrix(torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 0.0]])))
    return layer, ReplicatedWeights(optimizer)


@pytest.mark.parametrize("kind", [MaskedLinear, MaskedConv1D])
def test_a_change_of_links(kind):
    layer, engine = layer_of(kind)
    version = layer.storage.version
    stored = layer.storage.stored_weights(engine)
    stored.part.copy_(layer.matrix(torch.tensor([[0.0, 0.0, 7.0], [8.0, 0.0, 0.0]])))
    stamped = torch.zeros_like(stored.part, dtype=torch.int16)
    stamped.copy_(layer.matrix(torch.tensor([[1, 2, 0], [0, 3, 0]])))
    layer.storage.replace(NEW, engine, stored, (stamped, 9))
    assert layer.storage.version > version
    assert layer.topology.equal(NEW)
    assert layer.links == 3
    assert layer.storage.positions().tolist() == [0, 2, 4]
    # a link that stays keeps its weight, one that comes has the stored one
    assert layer.matrix(layer.weight).tolist() == [[1, 0, 7], [0, 3, 0]]
    # one that goes leaves its weight there, and those that stay theirs
    assert layer.matrix(stored.part).tolist() == [[1, 2, 7], [8, 3, 0]]
    assert layer.matrix(stamped).tolist() == [[1, 0, 9], [0, 3, 0]]
    for name, tensor in engine.held(layer).items():
        if name != "weight":
            assert layer.matrix(tensor).ne(0).tolist() == [[True, False, False], [False, True, False]], name
    check_zeros({"layer": layer}, engine)


@pytest.mark.parametrize("kind", [MaskedLinear, MaskedConv1D])
def test_new_links_start_at_zero_where_nothing_is_stored(kind):
    layer, engine = layer_of(kind)
    layer.storage.replace(NEW, engine)
    assert layer.matrix(layer.weight).tolist() == [[1, 0, 0], [0, 3, 0]]


def test_a_stray_is_named_with_the_tensor():
    layer, engine = layer_of(MaskedLinear)
    engine.held(layer)["exp_avg"][1, 0] = 1.0
    with pytest.raises(RuntimeError, match=r"layer is not 0 off its mask: \{'exp_avg': 1\}"):
        check_zeros({"layer": layer}, engine)
    assert layer.storage.strays(engine, finite=True)["exp_avg"] == 1
    engine.held(layer)["exp_avg"][1, 0] = torch.nan
    assert layer.storage.strays(engine, finite=True)["exp_avg"] == 0


@pytest.mark.parametrize("wrong", [OLD.t(), OLD.float(), OLD[:1]])
def test_a_topology_that_is_not_the_layers_changes_nothing(wrong):
    layer, engine = layer_of(MaskedLinear)
    with pytest.raises(ValueError, match=r"bool \(2, 3\)"):
        layer.storage.replace(wrong, engine)
    assert layer.topology.equal(OLD)

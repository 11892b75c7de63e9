"""MaskedConv1D, whose weight lies as (in, out): a topology is (out, in) all the same."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState
from transformers.pytorch_utils import Conv1D

from hf_chts import MaskedConv1D, MaskedLinear, SparsityConfig, TopologyCallback, sparsify
from hf_chts.sharding import ranks
from hf_chts.topology.bits import pack_bits, unpack_bits
from hf_chts.topology.random_streams import random_stream

# three outputs, two inputs; from the first input to outputs 0 and 2, from the second to output 0
MASK = torch.tensor([[True, True], [False, False], [True, False]])


def layer(mask=MASK):
    """Weights 1 to 6 as they lie: [[1, 2, 3], [4, 5, 6]]."""
    plain = Conv1D(3, 2)
    plain.weight = nn.Parameter(torch.arange(1.0, 7.0).view(2, 3))
    plain.bias = nn.Parameter(torch.tensor([100.0, 200.0, 300.0]))
    return MaskedConv1D.convert(plain, mask)


def test_worked_out_by_hand():
    masked = layer()
    assert masked.weight.tolist() == [[1, 0, 3], [4, 0, 0]]
    assert masked.mask.tolist() == [[True, False, True], [True, False, False]]
    assert masked.topology.equal(MASK)
    assert masked.matrix(masked.weight).tolist() == [[1, 4], [0, 0], [3, 0]]
    assert masked.links == 3
    masked.dense_gradient = torch.zeros(2, 3)
    output = masked(torch.tensor([[1.0, 2.0]]))
    assert output.tolist() == [[109, 200, 303]]
    (output * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    # of the link from input i to output o: x_i times the weight of output o in the sum
    assert masked.weight.grad.tolist() == [[1, 0, 100], [2, 0, 0]]
    assert masked.matrix(masked.dense_gradient).tolist() == [[1, 2], [10, 20], [100, 200]]
    assert masked.bias.grad.tolist() == [1, 10, 100]


def test_forward_is_that_of_a_plain_layer_and_of_a_linear_one():
    mask = torch.rand(6, 9, generator=random_stream(0)) < 0.4
    masked = MaskedConv1D.convert(Conv1D(6, 9), mask)
    plain = copy.deepcopy(masked).revert()
    linear = nn.Linear(9, 6)
    with torch.no_grad():
        linear.weight.copy_(masked.weight.t())
        linear.bias.copy_(masked.bias)
    linear = MaskedLinear.convert(linear, mask)
    x = torch.randn(2, 4, 9)
    assert masked(x).equal(plain(x))
    torch.testing.assert_close(masked(x), linear(x))
    for one in (masked, plain, linear):
        one(x).square().sum().backward()
    torch.testing.assert_close(masked.weight.grad, plain.weight.grad * mask.t())
    torch.testing.assert_close(masked.weight.grad.t(), linear.weight.grad)
    assert masked.weight.grad[~mask.t()].eq(0).all()


def test_converted_in_place_and_back():
    plain = Conv1D(3, 2)
    weight, keys = plain.weight, list(plain.state_dict())
    masked = MaskedConv1D.convert(plain, MASK)
    assert masked is plain
    assert masked.weight is weight
    assert list(masked.state_dict()) == keys == ["weight", "bias"]
    assert repr(masked) == "MaskedConv1D(nf=3, nx=2, links=3)"
    again = masked.revert()
    assert type(again) is Conv1D
    assert not list(again.buffers())
    again(torch.ones(1, 2)).sum().backward()
    assert again.weight.grad.ne(0).all()


def test_set_mask_takes_out_by_in_and_keeps_the_buffer():
    masked = layer(torch.ones(3, 2, dtype=torch.bool))
    buffer = masked.mask
    masked.set_mask(MASK)
    assert masked.mask is buffer
    assert masked.weight.tolist() == [[1, 0, 3], [4, 0, 0]]
    masked.set_mask(masked.topology)
    assert masked.topology.equal(MASK)


@pytest.mark.parametrize("mask", [MASK.t(), MASK.float(), MASK[:2]])
def test_wrong_masks_are_refused_and_leave_the_layer_plain(mask):
    plain = Conv1D(3, 2)
    with pytest.raises(ValueError, match=r"the mask of this layer is bool \(3, 2\)"):
        MaskedConv1D.convert(plain, mask)
    assert type(plain) is Conv1D
    assert not list(plain.buffers())


def test_only_the_class_itself():
    class Special(Conv1D):
        pass

    for other in (Special(3, 2), nn.Linear(2, 3)):
        with pytest.raises(
            TypeError, match=f"only Conv1D itself can become a MaskedConv1D, got {type(other).__name__}"
        ):
            MaskedConv1D.convert(other, MASK)


def test_compiled():
    masked = layer()
    x = torch.randn(3, 2)
    torch.testing.assert_close(torch.compile(masked, backend="aot_eager")(x), masked(x))


def network(method="rigl", sparsity=0.5, **values):
    config = SparsityConfig(method=method, sparsity=sparsity, target_modules=["0"], update_interval=1, **values)
    return sparsify(nn.Sequential(Conv1D(3, 2)), config)


def test_sparsify_check_and_unsparsify():
    sparse = network()
    assert type(sparse.layers["0"]) is MaskedConv1D
    assert sparse.masks()["0"].shape == (3, 2)
    sparse.layers["0"].set_mask(MASK)
    assert sparse.masks()["0"].equal(MASK)
    sparse.check()
    with torch.no_grad():
        sparse.layers["0"].weight[1, 2] = 1.0  # from input 1 to output 2
    with pytest.raises(RuntimeError, match="0 is not 0 off its mask"):
        sparse.check()
    assert type(sparse.unsparsify()[0]) is Conv1D


def test_masks_are_taken_as_out_by_in():
    model = nn.Sequential(Conv1D(3, 2))
    config = SparsityConfig(method="set", sparsity=0.5, target_modules=["0"])
    with pytest.raises(ValueError, match=r"the layer takes bool \(3, 2\)"):
        sparsify(model, config, masks={"0": MASK.t()})
    assert sparsify(model, config, masks={"0": MASK}).masks()["0"].equal(MASK)


def test_a_receptive_field_is_one_of_the_inputs_of_each_output():
    # 4 links to each of 12 outputs, the nearest of 20 inputs
    model = nn.Sequential(Conv1D(12, 20))
    config = SparsityConfig(
        method="static", sparsity=0.8, initial_topology="bipartite_receptive_field", brf_r=0.0, target_modules=["0"]
    )
    assert sparsify(model, config).masks()["0"].sum(1).tolist() == [4] * 12


class Run:
    """Steps of a run of four with an update after each, on a weight given as it lies."""

    def __init__(self, sparse, weight):
        self.layer = sparse.layers["0"]
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor(weight))
        self.layer.set_mask(self.layer.matrix(self.layer.weight != 0))
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=0.0)
        self.callback = TopologyCallback(sparse)
        self.state = TrainerState(max_steps=4)
        self.event(self.callback.on_train_begin)

    def event(self, hook):
        hook(
            SimpleNamespace(output_dir=None),
            self.state,
            TrainerControl(),
            model=self.callback.evolver.sparse.model,
            optimizer=self.optimizer,
        )

    def step(self):
        self.event(self.callback.on_step_begin)
        output = self.layer(torch.tensor([[1.0, 2.0]]))
        # dense gradients (out, in): [[1, 2], [30, 60], [20, 40]]
        (output * torch.tensor([1.0, 30.0, 20.0])).sum().backward()
        self.optimizer.step()
        self.state.global_step += 1
        self.event(self.callback.on_step_end)


def test_an_update_worked_out_by_hand():
    """The smallest of three links goes, and the one with the largest gradient comes."""
    run = Run(network(drop_fraction=0.3, drop_schedule="constant"), [[1.0, 0.0, 3.0], [2.0, 0.0, 0.0]])
    run.step()
    layer = run.layer
    assert layer.topology.tolist() == [[False, True], [False, True], [True, False]]
    assert layer.weight.tolist() == [[0, 0, 3], [2, 0, 0]]
    moments = run.optimizer.state[layer.weight]
    for tensor in (layer.weight.grad, moments["exp_avg"], moments["exp_avg_sq"]):
        assert tensor.ne(0).tolist() == [[False, False, True], [True, False, False]]


def test_a_stored_weight_comes_back_where_it_left():
    run = Run(network("gmp", sparsity=2 / 3), [[3.0, 0.0, 1.0], [2.0, 0.0, 0.0]])
    run.step()
    assert run.layer.topology.tolist() == [[True, True], [False, False], [False, False]]
    with torch.no_grad():
        run.layer.weight[1, 0] = 0.5  # less than the weight that left
    run.step()
    assert run.layer.topology.tolist() == [[True, False], [False, False], [True, False]]
    assert run.layer.weight.tolist() == [[3, 0, 1], [0, 0, 0]]


def test_masks_travel_between_ranks_as_out_by_in(monkeypatch):
    # as rank 0 of two, which evolves the layer; what it sends it also unpacks
    monkeypatch.setattr(ranks, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(ranks.dist, "broadcast", lambda *_, **__: None)
    new = torch.tensor([[False, True], [True, True], [False, False]])
    shapes = {name: mask.shape for name, mask in network().masks().items()}
    (masks,) = ranks.exchange({"0": (pack_bits(new), [1])}, shapes, {"0": 0}, new.device, n_counts=1)
    assert unpack_bits(masks["0"][0], shapes["0"]).equal(new)

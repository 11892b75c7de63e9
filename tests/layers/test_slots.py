"""Layers that keep a value for each link: what an update moves, what is refused, and models that are never dense."""

import copy
import pickle

import pytest
import torch
from cases import case_config
from tiny import random_blocks, tiny_llama
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from hf_chts import SparsityConfig, SparsityHandle, sparsify
from hf_chts.layers.linked_layer import LinkedConv1D, LinkedLinear, linked_class
from hf_chts.layers.stored_weights import StoredLinks
from hf_chts.sharding.replicated import ReplicatedWeights

OUT, IN, ALL = 6, 5, 256 * 2**20


def layer_of(kind=nn.Linear, slots=12, links=12, seed=0, dense_bytes=ALL):
    torch.manual_seed(seed)
    layer = nn.Linear(IN, OUT) if kind is nn.Linear else Conv1D(OUT, IN)
    topology = torch.zeros(OUT * IN, dtype=torch.bool)
    topology[torch.randperm(OUT * IN)[:links]] = True
    topology = topology.view(OUT, IN)
    weight = (layer.weight if kind is nn.Linear else layer.weight.t()).detach().where(topology, 0).clone()
    return linked_class(layer).attach(layer, topology, slots, dense_bytes), topology, weight


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_layer_computes_what_the_plain_one_did(kind):
    layer, topology, weight = layer_of(kind)
    assert type(layer) is (LinkedLinear if kind is nn.Linear else LinkedConv1D)
    x = torch.randn(3, IN)
    torch.testing.assert_close(layer(x), x @ weight.t() + layer.bias)
    assert layer.topology.equal(topology)
    assert layer.links == 12
    assert [name for name, _ in layer.named_parameters()] == ["link_values", "bias"]
    assert layer.state_dict().keys() == {"link_values", "bias"}
    assert layer.matrix(layer.weight).equal(weight)
    plain = layer.revert()
    assert type(plain) is kind
    assert plain.state_dict().keys() == {"weight", "bias"}
    torch.testing.assert_close(plain(x), x @ weight.t() + layer.bias)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_an_update_gives_slots_of_links_that_go_to_those_that_come(kind):
    layer, topology, _ = layer_of(kind, slots=14)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(2):
        layer(torch.randn(3, IN)).square().sum().backward()
        optimizer.step()
    engine, values = ReplicatedWeights(optimizer), layer.link_values
    before, positions = values.detach().clone(), layer.link_positions.clone()
    first = optimizer.state[values]["exp_avg"].clone()
    new = topology.clone()
    gone, come = topology.nonzero()[[0, 3, 7]], (~topology).nonzero()[[1, 4]]
    new[gone[:, 0], gone[:, 1]] = False
    new[come[:, 0], come[:, 1]] = True
    version = layer.storage.version
    layer.storage.replace(new, engine)
    assert layer.storage.version == version + 1
    assert layer.topology.equal(new)
    assert layer.links == 11
    assert layer.link_values is values  # the same parameter, of the same shape
    stay = (layer.link_positions == positions) & (positions != OUT * IN)
    assert int(stay.sum()) == 9
    assert values[stay].equal(before[stay])  # nothing else has moved
    assert optimizer.state[values]["exp_avg"][stay].equal(first[stay])
    for tensor in (values, values.grad, *(optimizer.state[values][key] for key in ("exp_avg", "exp_avg_sq"))):
        assert tensor[~stay].eq(0).all()
    assert int((layer.link_positions == OUT * IN).sum()) == 3
    assert layer.storage.positions().equal(new.flatten().nonzero().flatten())
    assert layer.storage.strays(engine) == dict.fromkeys(("weight", "gradient", "exp_avg", "exp_avg_sq"), 0)
    vacant = int((layer.link_positions == OUT * IN).nonzero()[0])
    with torch.no_grad():
        values[vacant] = 1
    assert layer.storage.strays(engine)["weight"] == 1
    assert layer.matrix(layer.weight)[~new].eq(0).all()  # it is of no link
    layer.storage.clear(engine)
    assert layer.storage.strays(engine)["weight"] == 0


def test_vacant_slots_stay_0_in_training():
    layer, _, _ = layer_of(slots=20)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(3):
        layer(torch.randn(3, IN)).square().sum().backward()
        assert layer.link_values.grad[layer.storage.missing()].eq(0).all()
        optimizer.step()
    assert layer.link_values[layer.storage.missing()].eq(0).all()
    assert int(layer.link_values.count_nonzero()) == 12


def test_more_links_than_slots_are_refused():
    layer, topology, _ = layer_of(slots=12)
    before = layer.link_positions.clone()
    with pytest.raises(ValueError, match=r"30 links does not fit into the 12 slots"):
        layer.set_mask(torch.ones_like(topology))
    with pytest.raises(ValueError, match=r"bool \(6, 5\)"):
        layer.set_mask(topology.t())
    assert layer.link_positions.equal(before)
    for wrong in (torch.arange(12)[:, None], torch.full((12,), 3), torch.arange(25, 37), torch.arange(12) - 1):
        with pytest.raises(ValueError, match="positions do not fit"):
            layer.storage.restore(topology, wrong)
    assert layer.link_positions.equal(before)


def test_copies():
    layer, _, _ = layer_of()
    x = torch.randn(3, IN)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied(x).equal(layer(x))
        copied.set_mask(torch.zeros_like(copied.topology))
        assert layer.links == 12
        assert copied.links == 0
    assert layer.to(torch.float64)(x.double()).dtype == torch.float64
    assert layer.link_positions.dtype == torch.int32


def test_the_weight_can_be_used_elsewhere():
    """As Mamba's dt_proj is: with the gradients of the layer's own product."""
    layer, topology, _ = layer_of()
    x, total = torch.randn(3, IN), torch.zeros(OUT, IN)
    layer(x).square().sum().backward()
    expected = layer.link_values.grad.clone()
    layer.link_values.grad = None
    layer.dense_gradient = total
    (x @ layer.weight.t() + layer.bias).square().sum().backward()
    torch.testing.assert_close(layer.link_values.grad, expected)
    torch.testing.assert_close(layer.storage.values(total), expected)
    assert total[~topology].ne(0).any()


def test_transforms():
    layer, _, _ = layer_of()
    x, parameters = torch.randn(3, IN), dict(layer.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    gradient = torch.func.grad(loss)(parameters, x)
    loss(parameters, x).backward()
    torch.testing.assert_close(gradient["link_values"], layer.link_values.grad)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    torch.testing.assert_close(each["link_values"].sum(0), layer.link_values.grad)
    _, tangent = torch.func.jvp(lambda x: layer(x), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, (torch.ones_like(x) @ layer.weight.t()).detach())


def test_large_weights_are_worked_through_in_blocks():
    models = []
    for storage, mib in (("masked", 256), ("links", 1)):
        torch.manual_seed(0)
        model = tiny_llama(hidden_size=512, intermediate_size=1376, num_attention_heads=8)
        sparse = sparsify(model, case_config("rigl", storage=storage, dense_mib=mib))
        models.append((model, sparse))
    large, small = (models[1][1].layers[f"model.layers.0.{name}"] for name in ("mlp.up_proj", "self_attn.q_proj"))
    assert large.storage.slots(large.link_positions, 4).block == 512
    assert large.storage.slots(large.link_positions, 2).block == 1024  # of bf16 twice as many
    assert small.storage.slots(small.link_positions, 4).order is None
    ids = torch.tensor(random_blocks(4)["input_ids"])
    logits = [model(input_ids=ids).logits for model, _ in models]
    torch.testing.assert_close(*logits)
    for one in logits:
        one.square().mean().backward()
    for name, layer in models[1][1].layers.items():
        torch.testing.assert_close(
            layer.link_values.grad, layer.slot_values(models[0][1].layers[name].weight.grad), rtol=1e-4, atol=1e-7
        )


def test_the_config():
    assert SparsityConfig("set", storage="links") == SparsityConfig("set")  # what is trained is the same
    assert "storage" not in SparsityConfig("set").to_dict()  # earlier versions read it
    config = SparsityConfig("set", storage="links", dense_mib=64)
    assert SparsityConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="unknown storage 'slots'"):
        SparsityConfig("set", storage="slots")
    with pytest.raises(ValueError, match="dense_mib is 0"):
        SparsityConfig("set", storage="links", dense_mib=0)


LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, vocab_size=96
)  # fmt: skip
MODELS = {
    "llama": (LlamaForCausalLM, LLAMA),
    # its rules make the weights of some layers smaller, by their names
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(n_embd=64, n_layer=4, n_head=4, vocab_size=96, bos_token_id=0),
    ),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(d_model=64, d_ff=96, num_layers=2, num_heads=4, vocab_size=96),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_never_dense(name):
    kind, settings = MODELS[name]
    config = SparsityConfig("chts", storage="links", sparsity=0.5)
    with torch.device("meta"):
        model = kind(settings)
    sparse = sparsify(model, config)
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.manual_seed(1)
    sparse.materialize()
    torch.manual_seed(0)
    dense = kind(settings)
    other = sparsify(dense, config)
    assert all(mask.equal(other.masks()[layer]) for layer, mask in sparse.masks().items())
    expected = dict(dense.named_parameters())
    assert expected.keys() == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        assert parameter.shape == expected[key].shape
        rel = 0.15 if parameter.numel() > 1000 else 0.5
        assert parameter.std().item() == pytest.approx(expected[key].std().item(), rel=rel, abs=1e-9), key
        noise = 6 * parameter.std().item() / parameter.numel() ** 0.5 + 1e-9
        assert parameter.mean().item() == pytest.approx(expected[key].mean().item(), abs=noise), key
    buffers = dict(dense.named_buffers())
    assert all(buffer.equal(buffers[key]) for key, buffer in model.named_buffers())
    if settings.tie_word_embeddings:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with pytest.raises(ValueError, match="has a value already"):
        sparse.materialize()


def test_what_is_refused_on_the_meta_device():
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA)
    with pytest.raises(ValueError, match="storage: links and call materialize"):
        sparsify(model, SparsityConfig("set"))
    with pytest.raises(ValueError, match="allocation 'global' compares weights"):
        sparsify(model, SparsityConfig("set", storage="links", allocation="global"))
    assert SparsityHandle.of(model) is None
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_stored_weights_of_links_come_and_go():
    layer, _, _ = layer_of()
    stored = StoredLinks(layer, torch.tensor([7, 2, 11]), torch.tensor([0.7, 0.2, 1.1]))
    assert stored.take(torch.tensor([2, 3, 7])).equal(torch.tensor([0.2, 0, 0.7]))
    stored.change(come=torch.tensor([2, 5]), gone=torch.tensor([29, 0, 11]), weights=torch.tensor([2.9, 0.1, 1.2]))
    assert stored.positions.tolist() == [0, 7, 11, 29]  # 2 has come, and 11 left again with another weight
    assert stored.values.equal(torch.tensor([0.1, 0.7, 1.2, 2.9]))
    matrix = torch.zeros(OUT * IN)
    matrix[[0, 7, 11, 29]] = torch.tensor([0.1, 0.7, 1.2, 2.9])
    assert stored.matrix(None).equal(matrix.view(OUT, IN))
    stored.change(come=stored.positions, gone=torch.tensor([], dtype=torch.int64), weights=torch.tensor([]))
    assert stored.take(torch.tensor([7])).equal(torch.zeros(1))


def test_weights_that_no_rule_initializes_are_refused():
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=tower | {"vocab_size": 50}, vision_config=tower | {"image_size": 16, "patch_size": 8}
    )
    with torch.device("meta"):
        model = CLIPModel(config)
    sparse = sparsify(model, case_config("set", storage="links", sparsity=0.8))
    with pytest.raises(ValueError, match="a CLIPModel is initialized say nothing of logit_scale"):
        sparse.materialize()

"""Weights of a block that are made together: the same results as made one by one, bit for bit."""

import copy
import pickle
from functools import partial

import pytest
import torch
from cases import Invariants, all_of, case_config, differences, trainer
from tiny import VOCABULARY, random_blocks, tiny_llama
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from hf_chts import SparsityConfig, sparsify
from hf_chts.evolution.evolver import Evolver
from hf_chts.layers import block_weights
from hf_chts.layers.block_weights import make_together


def gpt2():
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    torch.manual_seed(0)
    return GPT2LMHeadModel(config)


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))


def sparse_model(build):
    model = build()
    return model, sparsify(model, case_config("set", storage="links"))


def results(model, autocast=False, run=None):
    """The loss and all gradients."""
    ids = torch.tensor(random_blocks(4)["input_ids"])
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = (model if run is None else run)(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not one[name].equal(other[name])]


@pytest.fixture
def fills(monkeypatch):
    """How many layers each fill is of."""
    found, apply = [], block_weights._Fill.apply
    monkeypatch.setattr(block_weights._Fill, "apply", lambda *args: found.append(len(args) - 3) or apply(*args))
    return found


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("build", [tiny_llama, gpt2, t5])
def test_results_are_the_same(build, autocast, fills):
    model, _ = sparse_model(build)
    expected = results(model, autocast)
    assert not fills
    handles = make_together(model)
    assert_same(results(model, autocast), expected)
    layers = [module for module in model.modules() if hasattr(module, "link_values")]
    odd = [layer for layer in layers if any(side % 8 for side in layer.storage.shape)]
    assert sum(fills) == len(layers) - len(odd) * autocast  # in bf16 those are padded, each on its own
    assert len(fills) <= sum(fills) / 4
    number = len(fills)
    for handle in handles:
        handle.remove()
    assert_same(results(model, autocast), expected)
    assert len(fills) == number
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_under_activation_checkpointing(reentrant, own, fills):
    model, _ = sparse_model(tiny_llama)
    expected = results(model)
    make_together(model)
    if own:  # of a part of a block
        for block in model.model.layers:
            block.mlp.forward = partial(checkpoint, block.mlp.forward, use_reentrant=reentrant)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    assert_same(results(model), expected)
    assert bool(fills) == own  # layers of a block that is computed again make their weights themselves
    loss = model(input_ids=torch.zeros(1, 8, dtype=torch.long), labels=torch.zeros(1, 8, dtype=torch.long)).loss
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))  # as of a teacher, in between
    model.zero_grad()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_layer_that_takes_no_part_gets_no_gradient():
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertLMHeadModel(BertConfig(**settings, intermediate_size=48, is_decoder=True, add_cross_attention=True))
    sparsify(model, case_config("set", storage="links"))
    make_together(model)
    ids = torch.zeros(1, 8, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    layer = model.bert.encoder.layer[0]
    assert layer.crossattention.self.query.link_values.grad is None
    assert layer.attention.self.query.link_values.grad is not None


def test_another_autocast_within_a_block(fills):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                x = self.a(x.float())
            return self.b(x)

    model = torch.nn.Sequential(torch.nn.ModuleList([Block()]))
    sparsify(model, SparsityConfig("set", storage="links", sparsity=0.8, target_modules=["a", "b"]))
    x, found = torch.randn(4, 16), []
    for together in (False, True):
        if together:
            make_together(model)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model[0][0](x))
    assert found[0].equal(found[1])
    assert fills == [2]


def test_changes_of_links_values_and_copies_are_followed(fills):
    model, sparse = sparse_model(tiny_llama)
    make_together(model)
    results(model)
    evolver = sparse.evolver(torch.optim.AdamW(model.parameters()), max_steps=24)
    evolver.update(4)
    layer = sparse.layers["model.layers.0.mlp.up_proj"]
    with torch.no_grad():
        layer.link_values.mul_(2)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    number, expected = len(fills), results(plain)
    assert len(fills) == number
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(results(each), expected)
    assert len(fills) == number + 3 * 2
    evolver.close()


def test_slots_without_links_and_dense_gradients(fills):
    """A layer whose dense gradient is asked for is left out, and vacant slots get no gradient."""

    class Sum:
        def add_(self, gradient):
            self.sum = gradient.clone()

    model = tiny_llama()
    sparse = sparsify(model, case_config("chtss", storage="links"))
    layer = sparse.layers["model.layers.1.mlp.down_proj"]
    sparse.evolver(torch.optim.AdamW(model.parameters()), max_steps=24).update(16)
    assert all(each.storage.room > each.links for each in sparse.layers.values())
    layer.dense_gradient = Sum()
    expected = results(model)
    dense = layer.dense_gradient.sum
    make_together(model)
    assert_same(results(model), expected)
    assert layer.dense_gradient.sum.equal(dense)
    assert sum(fills) == len(sparse.layers) - 1


def test_a_weight_that_is_not_used_is_forgotten():
    model, sparse = sparse_model(tiny_llama)
    make_together(model)
    layer = sparse.layers["model.layers.0.mlp.up_proj"]
    layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError, match="stop"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    assert not any("made" in each.__dict__ for each in sparse.layers.values())


def test_only_small_models(fills):
    model = tiny_llama(hidden_size=512, intermediate_size=1376, num_attention_heads=8)
    sparsify(model, case_config("set", storage="links", dense_mib=12))
    # 2 blocks of 3.2 M weights are 12.1 MiB in 16 bits
    assert make_together(model) == []
    model = tiny_llama(hidden_size=512, intermediate_size=1376, num_attention_heads=8)
    sparsify(model, case_config("set", storage="links", dense_mib=13))
    make_together(model)
    results(model)
    assert not fills  # in 32 bits
    results(model, autocast=True)
    assert len(fills) == 2


@pytest.mark.parametrize("case", ["chtss", "rigl", "gmp"])
def test_whole_runs(tmp_path, case, monkeypatch, fills):
    one = trainer(tmp_path / "one", case, storage="links")
    one.train()
    assert not fills
    begin = Evolver.begin

    def with_hooks(self, *args, **kwargs):  # as on a GPU
        begin(self, *args, **kwargs)
        self._hooks += make_together(self.sparse.model)

    monkeypatch.setattr(Evolver, "begin", with_hooks)
    other = trainer(tmp_path / "other", case, storage="links")
    Invariants.watch(other)
    other.train()
    assert fills
    assert not differences(all_of(one), all_of(other))
    assert not any(module._forward_pre_hooks for module in other.model.modules())


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compilers_see_how_weights_are_made(backend):
    model, _ = sparse_model(partial(tiny_llama, num_hidden_layers=1))  # half as much to compile
    expected = results(model)
    make_together(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for name, value in results(model, run=compiled).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)

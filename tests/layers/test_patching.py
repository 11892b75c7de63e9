"""sparsify(): which layers, exactly how sparse, untouched where refused, and dense again."""

import copy

import pytest
import torch
from tiny import tiny_llama
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from hf_chts import MaskedLinear, SparsityConfig, SparsityHandle, sparsify
from hf_chts.methods import METHODS

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}, [type(m) for m in model.modules()]


def same(before, model):
    weights, types = snapshot(model)
    return types == before[1] and all(weights[name].equal(before[0][name]) for name in weights)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"dense"}))
@pytest.mark.parametrize("sparsity", [0.7, 0.95])
def test_default_targets_and_exact_links(method, sparsity):
    model = tiny_llama()
    config = SparsityConfig(method=method, sparsity=sparsity)
    sparse = sparsify(model, config)
    assert [name.rsplit(".", 1)[1] for name in sparse.layers] == PROJECTIONS * 2
    assert type(model.lm_head) is nn.Linear
    for name, layer in sparse.layers.items():
        assert model.get_submodule(name) is layer
        assert layer.links == round(layer.weight.numel() * (1 - config.initial_sparsity))
        assert layer.weight[~layer.mask].eq(0).all()
    assert sparse.sparsity() == pytest.approx(config.initial_sparsity, abs=1e-3)
    assert set(model.state_dict()) == set(tiny_llama().state_dict())
    assert SparsityHandle.of(model) is sparse
    sparse.check()


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["up_proj"], 2),
        (["mlp.up_proj", "q_proj"], 4),
        ([r"model\.layers\.0\..*"], 7),
        ([r".*\.(q|k)_proj", "q_proj"], 4),
        (["lm_head"], 1),
        ("o_proj", 2),
    ],
)
def test_target_modules(patterns, expected):
    assert len(sparsify(tiny_llama(), SparsityConfig(target_modules=patterns)).layers) == expected


def test_suffix_ends_at_a_dot():
    with pytest.raises(ValueError, match="'proj', which matches no linear layer"):
        sparsify(tiny_llama(), SparsityConfig(target_modules=["proj"]))


def test_the_topology_depends_on_its_seed_alone():
    first = sparsify(tiny_llama(seed=1), SparsityConfig())
    torch.manual_seed(99)
    second = sparsify(tiny_llama(seed=2), SparsityConfig())
    other = sparsify(tiny_llama(seed=1), SparsityConfig(topology_seed=1))
    for name, mask in first.masks().items():
        assert mask.equal(second.masks()[name])
        assert not mask.equal(other.masks()[name])
    q, k = (first.masks()[f"model.layers.0.self_attn.{p}_proj"] for p in "qk")
    assert not q.equal(k)


@pytest.mark.parametrize("topology", ["bipartite_small_world", "bipartite_scale_free"])
def test_other_initial_topologies(topology):
    config = SparsityConfig(method="set", initial_topology=topology, bsw_beta=0.0, bsf_equal_partition=True)
    layers = sparsify(tiny_llama(), config).layers
    assert all(layer.links == round(layer.mask.numel() * 0.1) for layer in layers.values())
    columns = layers["model.layers.0.self_attn.q_proj"].mask.sum(0)
    assert columns.max() - columns.min() <= 1  # β = 0 is a lattice; equal partition is asked for
    rows = layers["model.layers.0.self_attn.q_proj"].mask.sum(1)
    assert (rows.max() - rows.min() > 1) == (topology == "bipartite_scale_free")


def test_correlated_needs_calibration_inputs():
    config = SparsityConfig(method="set", initial_topology="correlated", target_modules=["q_proj"])
    model = tiny_llama()
    before = snapshot(model)
    wrong = {f"model.layers.{i}.self_attn.q_proj": torch.randn(20, 39) for i in range(2)}
    for calibration in (None, wrong):
        with pytest.raises(ValueError, match=r"needs calibration inputs \(samples, 40\) for model.layers.0"):
            sparsify(model, config, calibration=calibration)
    assert same(before, model)
    inputs = {name: torch.randn(20, 40) for name in wrong}
    sparse = sparsify(model, config, calibration=inputs)
    for name, layer in sparse.layers.items():
        strength = torch.corrcoef(inputs[name].T).abs().fill_diagonal_(0)
        assert strength[layer.mask].min() >= strength[~layer.mask].max() - 1e-6


def test_allocation_by_nodes():
    config = SparsityConfig(method="set", allocation="erdos_renyi")
    sparse = sparsify(tiny_llama(), config)
    assert sparse.links() == round(0.1 * sum(mask.numel() for mask in sparse.masks().values()))
    square = sparse.layers["model.layers.0.self_attn.q_proj"]  # 80 nodes to 1,600 weights
    oblong = sparse.layers["model.layers.0.mlp.up_proj"]  # 100 nodes to 2,400 weights
    assert square.links / oblong.links == pytest.approx(80 / 100, rel=0.02)


def test_dense_changes_nothing():
    model = tiny_llama()
    before = snapshot(model)
    sparse = sparsify(model, SparsityConfig(method="dense"))
    assert same(before, model)
    assert sparse.layers == {}
    assert sparse.sparsity() == 0.0


def test_unsparsify():
    model = tiny_llama()
    types = snapshot(model)[1]
    sparse = sparsify(model, SparsityConfig())
    weights = snapshot(model)[0]
    assert sparse.unsparsify() is model
    assert same((weights, types), model)
    assert SparsityHandle.of(model) is None
    sparsify(model, SparsityConfig())


def test_given_masks():
    model = tiny_llama()
    masks = {
        name: mask.clone() for name, mask in sparsify(tiny_llama(), SparsityConfig(topology_seed=5)).masks().items()
    }
    sparse = sparsify(model, SparsityConfig(), masks=masks)
    assert all(sparse.masks()[name].equal(masks[name]) for name in masks)


def test_check_finds_a_stray_weight():
    sparse = sparsify(tiny_llama(), SparsityConfig())
    name, layer = next(iter(sparse.layers.items()))
    with torch.no_grad():
        layer.weight[tuple((~layer.mask).nonzero()[0])] = 1.0
    with pytest.raises(RuntimeError, match=f"{name} is not 0 off its mask.*1"):
        sparse.check()


class Special(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


def frozen(model):
    model.model.layers[1].mlp.up_proj.weight.requires_grad = False


def special(model):
    model.model.layers[1].mlp.up_proj = Special(40, 60)


def shared(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


@pytest.mark.parametrize(
    ("change", "values", "message"),
    [
        (None, {"target_modules": ["nothing"]}, "'nothing', which matches no linear layer"),
        (None, {"target_modules": ["q_proj", "w1"]}, "'w1', which matches no linear layer"),
        (None, {"sparsity": 0.9999}, r"\(40, 40\) would have no link left at sparsity 0.9999"),
        (frozen, {}, "layers.1.mlp.up_proj is frozen"),
        (special, {}, "layers.1.mlp.up_proj is a Special, .* exclude_modules"),
        (special, {"target_modules": ["layers.1.mlp.up_proj"]}, "is a Special, .* can only be trained dense"),
        (shared, {}, "layers.0.mlp.up_proj shares its weight with .*layers.1.mlp.up_proj"),
    ],
)
def test_refused_before_anything_is_touched(change, values, message):
    model = tiny_llama()
    if change:
        change(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        sparsify(model, SparsityConfig(**values))
    assert same(before, model)
    assert SparsityHandle.of(model) is None


def test_percolation_of_an_unknown_architecture_is_refused_by_name():
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    )
    before = snapshot(model)
    with pytest.raises(ValueError, match="percolation is not known for .*GPTNeoX"):
        sparsify(model, SparsityConfig(percolation=True))
    assert same(before, model)
    assert len(sparsify(model, SparsityConfig()).layers) == 4


def test_tied_embeddings_are_refused_as_a_target():
    with pytest.raises(ValueError, match=r"lm_head shares its weight with .*embed_tokens"):
        sparsify(tiny_llama(tie_word_embeddings=True), SparsityConfig(target_modules=["lm_head"]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda masks: masks.popitem(), "not those of this model and config: missing"),
        (lambda masks: masks.update(extra=torch.ones(1, dtype=torch.bool)), "unknown .*extra"),
        (lambda masks: masks.update({next(iter(masks)): torch.ones(3, 3, dtype=torch.bool)}), "the layer takes bool"),
        (lambda masks: masks.update({next(iter(masks)): torch.ones(40, 40)}), "is torch.float32"),
    ],
)
def test_masks_that_do_not_fit(spoil, message):
    masks = dict(sparsify(tiny_llama(), SparsityConfig()).masks())
    spoil(masks)
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        sparsify(model, SparsityConfig(), masks=masks)
    assert same(before, model)


def test_twice_is_refused():
    model = tiny_llama()
    sparsify(model, SparsityConfig())
    with pytest.raises(ValueError, match="sparse already"):
        sparsify(model, SparsityConfig())


def test_a_model_without_blocks_needs_names():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="name the layers in target_modules. Its linear layers: 0, 2"):
        sparsify(model, SparsityConfig(sparsity=0.5, initial_sparsity=0.5))
    assert isinstance(sparsify(model, SparsityConfig(target_modules=["0"])).layers["0"], MaskedLinear)


def test_a_copy_is_sparse_too():
    model = tiny_llama()
    sparsify(model, SparsityConfig())
    twin = copy.deepcopy(model)
    assert SparsityHandle.of(twin).model is twin
    assert SparsityHandle.of(twin).layers.keys() == SparsityHandle.of(model).layers.keys()

"""topk: the largest of all weights after every step, and what comes with it; the table of cases has its invariants."""

import math

import pytest
import torch
from cases import all_of, differences, trainer
from tiny import random_blocks, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_chts import SparsityConfig, SparsityHandle, export_sparse, load_sparse, sparsify
from hf_chts.layers.activations import abs_top_k, keep_largest_activations
from hf_chts.layers.neurons import neuron_dimension
from hf_chts.layers.other_weights import keep_largest
from hf_chts.sharding.replicated import ReplicatedWeights
from hf_chts.topology.allocation import links_at
from hf_chts.topology.largest import largest

EVERY_STEP = {"method": "topk", "update_interval": 1, "sparsity": 0.95}


def config(**changes):
    return SparsityConfig(**(EVERY_STEP | changes))


def test_the_largest_stay_and_each_neuron_keeps_its_floor():
    weight = torch.tensor([[9.0, -8.0, 7.0, 6.0], [0.1, 0.2, -0.3, 0.0], [5.0, 1.0, -2.0, 0.5]])
    choose = {"links": 5, "generator": torch.Generator()}
    # the five largest of all, wherever they are
    assert largest(weight, None, least=4, **choose).int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    # five links of three neurons: each keeps its largest one, and the others are the largest of the rest
    assert largest(weight, 0, least=4, **choose).int().tolist() == [[1, 1, 1, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
    # the neurons are the inputs
    assert largest(weight, 1, least=1, **choose).int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert int(largest(weight, 1, 12, torch.Generator(), least=9).sum()) == 12


def test_the_neurons_of_layers_by_name():
    names = ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.0.self_attn.o_proj", "down_proj", "lm_head"]
    assert [neuron_dimension(name) for name in names] == [0, 0, 1, 1, None]
    assert [neuron_dimension(f"h.0.{name}") for name in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")] == [0, 0, 1]


class EveryStep(TrainerCallback):
    """Works each step out again by hand: a dense optimizer step, then the largest weights."""

    def __init__(self, run):
        self.run, self.steps = run, 0

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.moved = {name: layer.weight.detach().clone() for name, layer in self.run.sparse.layers.items()}

    def on_step_end(self, args, state, control, **kwargs):
        plan = self.run.sparse.config.plan(args.max_steps)
        sparsity = plan.sparsity(state.global_step)
        assert sparsity == pytest.approx(0.95 * min(1, state.global_step / 12))
        for name, layer in self.run.sparse.layers.items():
            links = links_at(layer.weight.numel(), sparsity)
            assert layer.links == links
            along = 0 if name.endswith(("o_proj", "down_proj")) else 1
            size = self.moved[name].abs()
            neurons = size.shape[1 - along]
            floor = min(4, links // neurons)
            first = torch.zeros_like(size, dtype=torch.bool)
            for neuron in range(neurons):
                line = size.select(1 - along, neuron)
                first.select(1 - along, neuron)[line.argsort(descending=True)[:floor]] = True
            rest = size.masked_fill(first, -1).flatten().argsort(descending=True)[: links - int(first.sum())]
            expected = first.flatten().index_fill(0, rest, True).view_as(first)
            assert layer.mask.equal(expected)
            assert layer.weight.equal(torch.where(expected, self.moved[name], 0))
        self.steps += 1


def run_of(directory, save="no", model=None, **changes):
    made = trainer(
        directory, "topk", model=model, config=EVERY_STEP | changes, update_warmup_steps=0, save_strategy=save,
        logging_steps=5, save_steps=7,
    )  # fmt: skip
    return made


def test_every_step_is_a_dense_step_and_then_the_largest_weights(tmp_path):
    run = run_of(tmp_path)
    watch = EveryStep(run)
    run.add_callback(watch)
    run.train()
    assert watch.steps == 24
    assert not any(layer.storage.trains_missing for layer in run.sparse.layers.values())
    # figures come with the log's own steps, not in lines of their own
    assert [entry["step"] for entry in run.state.log_history if "itop" in entry] == [5, 10, 15, 20, 24]
    assert len(run.evolver.history) == 24


def test_resumed_bit_for_bit_with_updates_after_every_step(tmp_path):
    settings = {"also_sparse": ["embeddings", "norms"], "rate_by_density": "inverse_sqrt", "activation_topk": 0.25}
    whole = run_of(tmp_path / "whole", "steps", **settings)
    whole.train()
    for step in (7, 14):
        again = run_of(tmp_path / f"from {step}", "steps", tiny_llama(seed=5), **settings)
        again.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
        assert differences(all_of(again), all_of(whole)) == []


def test_other_weights_are_sparse_at_every_step(tmp_path):
    model = tiny_llama(attention_bias=True)
    run = run_of(tmp_path, model=model, also_sparse=["embeddings", "biases", "norms"])
    seen = []

    class Others(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            sparsity = run.sparse.config.plan(args.max_steps).sparsity(state.global_step)
            layers = {id(layer.weight) for layer in run.sparse.layers.values()}
            others = [one for one in model.parameters() if id(one) not in layers]
            for weight in others:
                assert int(weight.count_nonzero()) <= max(1, links_at(weight.numel(), sparsity))
            seen.append(len(others))

    run.add_callback(Others())
    run.train()
    assert seen == [2 + 5 + 8] * 24  # two tables, five norms, four biases in each of two blocks
    assert int(model.lm_head.weight.count_nonzero()) == links_at(model.lm_head.weight.numel(), 0.95)
    assert run.evolver.history[-1]["sparsity"] == pytest.approx(0.95, abs=1e-3)
    assert run.state.log_history[-2]["other_sparsity"] == pytest.approx(0.95, abs=5e-3)


def test_one_of_a_small_tensor_stays():
    weight = nn.Parameter(torch.tensor([[0.1, -3.0], [2.0, 0.0]]))
    assert keep_largest([weight], 0.99) == (1, 4)
    assert weight.tolist() == [[0.0, -3.0], [0.0, 0.0]]


def test_the_rate_rises_as_links_go(tmp_path):
    run = trainer(
        tmp_path, "topk", config={**EVERY_STEP, "rate_by_density": "inverse_sqrt"}, update_warmup_steps=0,
        lr_scheduler_type="constant", save_strategy="no",
    )  # fmt: skip
    run.train()
    rates = {entry["step"]: entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry}
    plan = run.sparse.config.plan(24)
    assert rates[1] == pytest.approx(1e-2)
    assert rates[24] == pytest.approx(1e-2 / math.sqrt(0.05))
    # step n + 1 has the rate of the links that step n left
    assert all(rates[n + 1] == pytest.approx(1e-2 / math.sqrt(1 - plan.sparsity(n))) for n in range(1, 24))


def test_after_training_missing_links_stay_missing_in_any_loop(tmp_path):
    run = run_of(tmp_path)
    run.train()
    model, masks = run.model, {name: mask.clone() for name, mask in run.sparse.masks().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        batch = torch.tensor(random_blocks(2)["input_ids"])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    run.sparse.check()
    assert all(layer.mask.equal(masks[name]) for name, layer in run.sparse.layers.items())
    # and a second training goes on with them
    run.train()
    run.sparse.check()


def test_only_the_largest_activations_stay():
    values = torch.tensor([[1.0, -4.0, 3.0, 0.5], [-0.1, 0.2, 0.3, -0.4]])
    assert abs_top_k(values, 0.5).tolist() == [
        [0.0, -4.0, 3.0, 0.0],
        [0.0, 0.0, pytest.approx(0.3), pytest.approx(-0.4)],
    ]
    model, seen = tiny_llama(), {}
    sparsify(model, config(activation_topk=0.25))
    for name, module in model.named_modules():
        if name.endswith(("_layernorm", "_proj")):
            module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: (args[0], output)}))
    ids = torch.arange(16).view(2, 8)
    sparse_logits = model(ids).logits
    whole = ("gate_proj", "up_proj")  # what is cut is their product
    for name, (given, output) in seen.items():
        assert (output.count_nonzero(-1) == round(output.shape[-1] * (1 if name.endswith(whole) else 0.25))).all(), name
        if name.endswith("down_proj"):
            assert (given.count_nonzero(-1) == 15).all()
    SparsityHandle.of(model).unsparsify()
    assert not model(ids).logits.equal(sparse_logits)


def test_exports_with_fewer_activations_are_packed(tmp_path):
    model = tiny_llama().eval()
    sparsify(model, config(activation_topk=0.25, initial_sparsity=0.5))
    ids = torch.arange(16).view(2, 8)
    with pytest.raises(ValueError, match="activation_topk is 0.25: .* use export_sparse"):
        export_sparse(model, tmp_path / "plain")
    export_sparse(model, tmp_path / "packed", packed=True)
    with torch.no_grad():
        expected = model(ids).logits
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
        assert loaded(ids).logits.equal(expected)
        assert load_sparse(tmp_path / "packed").eval()(ids).logits.equal(expected)
        packed = load_sparse(tmp_path / "packed", compute="sparse").eval()
        torch.testing.assert_close(packed(ids).logits, expected)
    keep_largest_activations(loaded, 1.0)
    assert not loaded(ids).logits.equal(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"storage": "links"}, "storage is 'links', but with regrowth 'largest'.* set storage: masked"),
        ({"method": "chts", "also_sparse": ["norms"]}, "also_sparse is .'norms'., .* use method topk"),
        ({"method": "set", "neuron_links": 4}, "neuron_links is 4, .* method 'set'"),
        ({"also_sparse": ["biasses"]}, "unknown also_sparse 'biasses'; did you mean 'biases'"),
        ({"neuron_links": -1}, "neuron_links is -1"),
        ({"activation_topk": 0.0}, "activation_topk is 0.0"),
        ({"method": "dense", "activation_topk": 0.5}, "be 1 for a dense model"),
        ({"regrown_adam": "per_weight_steps"}, "regrown_adam 'per_weight_steps', but with regrowth 'largest'"),
        ({"regrown_weights": "historical"}, "regrown_weights is 'historical'"),
        ({"percolation": True}, "percolation is true"),
    ],
)
def test_what_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SparsityConfig(**({"method": "topk"} | values))


def test_a_floor_of_no_links_is_kept_in_files(tmp_path):
    made = SparsityConfig(method="topk", neuron_links=0)
    made.save(tmp_path)
    assert SparsityConfig.load(tmp_path) == made
    assert "neuron_links" not in SparsityConfig(method="set").to_dict()


def test_engines_that_split_weights_are_refused(monkeypatch):
    monkeypatch.setattr(ReplicatedWeights, "sharded", True)
    model = tiny_llama()
    sparse = sparsify(model, config())
    with pytest.raises(ValueError, match="regrowth 'largest' .* train in one process or with DDP"):
        sparse.evolver(torch.optim.AdamW(model.parameters()), 24)
    assert not any(layer.storage.trains_missing for layer in sparse.layers.values())


def test_what_there_is_none_of_is_refused():
    model = tiny_llama()
    sparse = sparsify(model, config(also_sparse=["biases"]))
    with pytest.raises(ValueError, match="also_sparse has 'biases', and LlamaForCausalLM trains none"):
        sparse.evolver(torch.optim.AdamW(model.parameters()), 10)
    other = nn.Sequential(nn.ModuleList([nn.Sequential(nn.Linear(32, 32))]))
    with pytest.raises(ValueError, match="activation_topk knows blocks like LLaMA's"):
        sparsify(other, config(activation_topk=0.25))
    assert type(other[0][0][0]) is nn.Linear

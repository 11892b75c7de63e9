"""Patterns in training: transposed layers, with numba and without, selections, and what is refused before it begins."""

import copy
from unittest import mock

import pytest
import torch
from cases import INTERVAL, Invariants, case_config, check_pattern, trainer
from tiny import VOCABULARY, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from hf_chts import SparsityHandle, sparsify
from hf_chts.evolution.update import TopologyUpdate
from hf_chts.topology import choosing, link_sampling
from hf_chts.topology.patterns import pattern_of, under_pattern
from hf_chts.topology.random_streams import random_stream


@pytest.mark.parametrize("storage", ["masked", "links"])
@pytest.mark.parametrize("case", ["rigl, fan-in", "rigl, 2:4"])
def test_the_pattern_of_a_transposed_layer_is_along_its_inputs(tmp_path, case, storage):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=1, n_head=2, n_positions=32))
    run = trainer(tmp_path, case, model=model, storage=storage)
    assert all(layer.transposed for layer in run.sparse.layers.values())
    invariants = Invariants.watch(run)  # topologies are (out, in), and their rows are counted
    run.train()
    assert invariants.updates >= 4


@pytest.mark.parametrize("case", ["chtss, fan-in", "chts, fan-in per head", "chts, 1:5 in attention"])
def test_the_same_topology_with_numba_and_without(tmp_path, case):
    pytest.importorskip("numba")
    options = {"max_steps": 12, "save_strategy": "no"}
    first = trainer(tmp_path, case, **options)
    first.train()
    second = trainer(tmp_path, case, **options)
    with (
        mock.patch.object(choosing, "loops", return_value=None),
        mock.patch.object(link_sampling, "loops", return_value=None),
    ):
        second.train()
    assert first.evolver.history[0]["links_removed"] > 0
    for name, mask in first.sparse.masks().items():
        assert mask.equal(second.sparse.masks()[name])


@pytest.mark.parametrize("pattern", ["fan_in", "2:4"])
def test_a_selection_takes_the_largest_of_each_run(pattern):
    config = case_config("gmp", pattern=pattern, sparsity=0.5, sparsity_schedule="constant")
    drawn = torch.rand(6, 12, generator=random_stream(1)) < 0.5
    masks = {"a": under_pattern(drawn, pattern_of(pattern), 36, 0)}
    sizes = torch.rand(6, 12, generator=random_stream(2))
    update = TopologyUpdate(
        plan=config.plan(24), step=INTERVAL, masks=masks, links={"a": 36}, gradients={},
        stored={"a": -sizes.masked_fill(masks["a"], 0)},
    )  # fmt: skip
    found = update.evolve(["a"], {"a": sizes.where(masks["a"], 0)})["a"].mask
    check_pattern(pattern, found)
    kept, width = (2, 4) if pattern == "2:4" else (6, 12)
    assert found.view(-1, width).equal(
        sizes.view(-1, width) >= sizes.view(-1, width).sort(1, descending=True).values[:, kept - 1 : kept]
    )


@pytest.mark.parametrize("pattern", ["fan_in", "2:4"])
@pytest.mark.parametrize("scores", ["magnitude", "wanda"])
def test_a_dense_model_is_pruned_to_the_best_of_each_run(pattern, scores):
    model = tiny_llama()
    weight = model.model.layers[0].mlp.up_proj.weight.detach().abs()
    norms = torch.rand(weight.shape[1], generator=random_stream(1))
    config = case_config("static", pattern=pattern, sparsity=0.5, initial_topology=scores, target_modules=["up_proj"])
    mask = next(iter(sparsify(model, config, calibration=norms).masks().values()))
    check_pattern(pattern, mask)
    size = weight * norms if scores == "wanda" else weight
    kept, width = (2, 4) if pattern == "2:4" else (20, 40)
    runs = size.view(-1, width)
    assert mask.view(-1, width).equal(runs >= runs.sort(1, descending=True).values[:, kept - 1 : kept])


def test_refused_before_the_model_is_changed():
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"\(40, 40\): pattern is '3:7', and 40 inputs .* .exclude_modules"):
        sparsify(model, case_config("chts", pattern="3:7"))
    with pytest.raises(ValueError, match=r"would have \d+ links at sparsity 0.98, fewer than outputs"):
        sparsify(model, case_config("chts", pattern="fan_in", sparsity=0.98))
    with pytest.raises(ValueError, match="'largest' chooses links by itself"):
        case_config("topk", pattern="fan_in")
    masks = sparsify(copy.deepcopy(model), case_config("chts", sparsity=0.5, initial_topology="erdos_renyi")).masks()
    for pattern in ("fan_in", "2:4"):
        with pytest.raises(ValueError, match=f"q_proj does not have the pattern '{pattern}' of the config"):
            sparsify(model, case_config("chts", pattern=pattern, sparsity=0.5), masks=masks)
    assert SparsityHandle.of(model) is None
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())

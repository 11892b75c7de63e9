"""A layer that does not train does not evolve, whichever method, and whenever and however it was frozen."""

import json
import logging

import pytest
import torch
from cases import VARIED, arguments, case_config, same_weights, trainer, weights
from peft import LoraConfig, get_peft_model
from tiny import random_blocks, tiny_llama
from transformers import TrainerCallback

from hf_chts import SparseTrainer, sparsify
from hf_chts.layers.shares import layer_links
from hf_chts.topology.allocation import allocate_links
from hf_chts.topology.percolation import gated_mlp, percolate

FROZEN = [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkvo"]
WARNING = "frozen or not in the optimizer"


def freeze(model, names=FROZEN, trains=False):
    for name in names:
        model.get_submodule(name).requires_grad_(trains)


def snapshot(sparse, names=FROZEN):
    return {name: (sparse.layers[name].mask.clone(), sparse.layers[name].weight.detach().clone()) for name in names}


def unchanged(sparse, before):
    return all(
        sparse.layers[name].mask.equal(mask) and sparse.layers[name].weight.equal(weight)
        for name, (mask, weight) in before.items()
    )


def said(caplog):
    return [record.getMessage() for record in caplog.records if WARNING in record.getMessage()]


@pytest.mark.parametrize("case", VARIED)
def test_frozen_after_the_trainer_is_made(tmp_path, case, caplog):
    run = trainer(tmp_path, case, save_strategy="no")
    freeze(run.model)
    frozen = [name for name in FROZEN if name in run.sparse.layers]
    before, others = snapshot(run.sparse, frozen), snapshot(run.sparse, run.sparse.layers.keys() - FROZEN)
    with caplog.at_level(logging.WARNING):
        run.train()
    assert unchanged(run.sparse, before)
    run.evolver.check()
    # the others evolve as they would beside layers that train
    config = run.sparse.config
    assert all(not run.sparse.layers[name].mask.equal(mask) for name, (mask, _) in others.items())
    if config.allocation != "global":
        shapes = {name: tuple(mask.shape) for name, mask in run.sparse.masks().items()}
        expected = layer_links(shapes, config.sparsity, config, {})
        for name in others:
            assert run.sparse.layers[name].links == expected[name], name
    (warning,) = said(caplog)
    assert all(name in warning for name in frozen)
    assert "layers.1" not in warning
    # what is told of each update counts the links that there are
    possible = sum(mask.numel() for mask in run.sparse.masks().values())
    assert run.evolver.history[-1]["sparsity"] == pytest.approx(1 - run.sparse.links() / possible)
    lines = [json.loads(line) for line in (tmp_path / "topology/layers.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        for index, name in enumerate(lines[0]["layers"]):
            if name in FROZEN:
                assert line["removed"][index] == line["regrown"][index] == 0
                assert line["links"][index] == line["explored"][index] == int(before[name][0].sum())


def test_weights_that_the_optimizer_does_not_have(tmp_path, caplog):
    run = trainer(tmp_path, "set", save_strategy="no")
    left_out = {id(run.sparse.layers[name].weight) for name in FROZEN}
    run.optimizer = torch.optim.AdamW([p for p in run.model.parameters() if id(p) not in left_out], lr=1e-2)
    before = snapshot(run.sparse)
    run.train()
    assert unchanged(run.sparse, before)
    assert len(said(caplog)) == 1


class Thaw(TrainerCallback):
    """Freezes some layers after one step and thaws them after another."""

    def __init__(self, frozen_after, thawed_after):
        self.steps = {frozen_after: False, thawed_after: True}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            freeze(model, trains=self.steps[state.global_step])


@pytest.mark.parametrize("case", ["gmp", "rigl, historical weights", "chtss, per-weight Adam steps"])
def test_frozen_for_a_while_in_the_middle(tmp_path, case):
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step] = snapshot(run.sparse)

    # frozen for the updates after steps 4 and 8
    run = trainer(tmp_path, case, save_strategy="no", callbacks=[Thaw(2, 9)])
    run.add_callback(Look())
    run.train()

    def moved(step, other):
        return [not seen[step][name][0].equal(seen[other][name][0]) for name in FROZEN]

    for step in range(3, 12):
        assert not any(moved(step, 2))
    for step in range(3, 10):
        assert all(seen[step][name][1].equal(seen[2][name][1]) for name in FROZEN), step
    assert all(moved(12, 11))
    shapes = {name: tuple(mask.shape) for name, mask in run.sparse.masks().items()}
    for name, links in layer_links(shapes, 0.9, run.sparse.config, {}).items():
        assert run.sparse.layers[name].links == links
    run.evolver.check()


def test_nothing_evolves_where_no_layer_trains(tmp_path, caplog):
    run = trainer(tmp_path, "rigl", save_strategy="no")
    freeze(run.model, run.sparse.layers)
    before = snapshot(run.sparse, run.sparse.layers)
    run.train()
    assert unchanged(run.sparse, before)
    assert run.evolver.history == []
    assert len(said(caplog)) == 1
    assert not [entry for entry in run.state.log_history if "itop" in entry]
    assert all(layer.dense_gradient is None for layer in run.sparse.layers.values())


@pytest.mark.parametrize("case", ["gmp", "rigl, historical weights", "chtss, per-weight Adam steps"])
def test_resumed_bit_for_bit(tmp_path, case):
    def run(model, directory, resume=None):
        one = trainer(directory, case, model=model)
        freeze(one.model)
        one.train(resume_from_checkpoint=resume)
        return one

    whole = run(tiny_llama(), tmp_path / "whole")
    resumed = run(tiny_llama(seed=5), tmp_path / "resumed", str(tmp_path / "whole/checkpoint-10"))
    for name, value in whole.model.state_dict().items():
        assert value.equal(resumed.model.state_dict()[name]), name
    for name, mask in whole.sparse.masks().items():
        assert mask.equal(resumed.sparse.masks()[name])


def test_global_allocation_does_not_share_out_what_frozen_layers_keep(tmp_path):
    run = trainer(tmp_path, "granet, global allocation", save_strategy="no")
    freeze(run.model)
    kept = {name: run.sparse.layers[name].links for name in FROZEN}
    weights = {}

    class Look(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step + 1 == run.evolver.plan.last_update:
                weights.update({name: layer.weight.detach().clone() for name, layer in run.sparse.layers.items()})

    run.add_callback(Look())
    run.train()
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    scores = {name: weight.abs() for name, weight in weights.items()}
    expected = allocate_links(shapes, 0.9, "global", scores)
    for name, layer in run.sparse.layers.items():
        assert layer.links == kept.get(name, expected[name]), name


def test_a_frozen_layer_of_a_junction_keeps_its_links_and_tells_the_others(tmp_path, monkeypatch):
    up, down = (f"model.layers.0.mlp.{kind}_proj" for kind in ("up", "down"))
    percolated = []

    def spy(masks, *args):
        percolated.append(percolate(masks, *args))
        return percolated[-1]

    monkeypatch.setattr("hf_chts.evolution.update.percolate", spy)
    run = SparseTrainer(
        model=tiny_llama(),
        args=arguments(tmp_path, save_strategy="no", max_steps=8),
        sparsity=case_config("set", percolation=True, drop_fraction=0.3),
        train_dataset=random_blocks(),
    )
    freeze(run.model, [up])
    dead = torch.arange(60) % 7 == 0
    mask = run.sparse.layers[up].topology & ~dead[:, None]
    run.sparse.layers[up].set_mask(mask)
    run.train()
    assert run.sparse.layers[up].mask.equal(mask)
    kept = next(masks for masks in percolated if down in masks)
    assert kept[up].equal(mask)
    assert not kept[down][:, dead].any()
    assert kept[down].any()


def test_percolation_around_a_fixed_layer():
    masks = {name: torch.ones(3, 3, dtype=torch.bool) for name in ("gate", "up", "down")}
    masks["up"][0] = False  # neuron 0 is inactive
    masks["down"][:, 1] = False  # neuron 1 too
    junctions = [gated_mlp("gate", "up", "down", neurons=3)]
    kept = percolate(masks, junctions, ["up"])
    assert kept["up"].equal(masks["up"])
    assert kept["gate"].sum(1).tolist() == kept["down"].sum(0).tolist() == [0, 0, 3]


def test_layers_that_are_thawed_beside_adapters_evolve(tmp_path):
    model = tiny_llama()
    sparse = sparsify(model, case_config("chtss"))
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    for block in model.model.layers:
        block.mlp.requires_grad_(True)
    before = snapshot(sparse, sparse.layers)
    run = SparseTrainer(model=peft, args=arguments(tmp_path, save_strategy="no"), train_dataset=random_blocks())
    run.train()
    for name, layer in sparse.layers.items():
        assert layer.mask.equal(before[name][0]) == ("mlp" not in name), name
    sparse.check()


def test_copies_that_would_train_without_evolving_are_refused(tmp_path):
    for method, refused in (("set", True), ("static", False)):
        model = tiny_llama()
        sparsify(model, case_config(method))
        run = SparseTrainer(
            model=get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"])),
            args=arguments(tmp_path, save_strategy="no"),
            train_dataset=random_blocks(),
        )
        if refused:
            with pytest.raises(ValueError, match="copies of sparse layers.*down_proj.modules_to_save.default"):
                run.train()
            continue
        run.train()
        run.sparse.check()
        copies = run.sparse.copies()
        assert len(copies) == 2
        assert all(layer.weight[layer.mask].ne(0).any() for layer in copies.values())


ADAPTERS = {
    "get_peft_model": get_peft_model,
    "compiled": lambda model, config: torch.compile(get_peft_model(model, config), backend="eager"),
    "add_adapter": lambda model, config: (model.add_adapter(config), model)[1],
}


def beside_adapters(directory, adapt, seed=0, trains=False, callbacks=None, **changes):
    model = tiny_llama(seed)
    sparsify(model, case_config("set", sparsity=0.8))
    adapted = ADAPTERS[adapt](model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    if trains:
        model.requires_grad_(True)
    args = arguments(directory, **({"max_steps": 12, "save_steps": 8} | changes))
    return SparseTrainer(model=adapted, args=args, train_dataset=random_blocks(), callbacks=callbacks)


@pytest.mark.parametrize("adapt", ADAPTERS)
def test_checkpoints_that_would_lack_what_trains_are_refused(tmp_path, adapt):
    run = beside_adapters(tmp_path, adapt, trains=True)
    before = snapshot(run.sparse, run.sparse.layers)
    with pytest.raises(ValueError, match=r"PEFT adapters.*that train: model\.layers\.0\.self_attn\.q_proj"):
        run.train()
    assert unchanged(run.sparse, before)
    assert run.state.global_step == 0


def test_what_trains_beside_adapters_trains_without_checkpoints(tmp_path):
    run = beside_adapters(tmp_path, "get_peft_model", trains=True, save_strategy="no")
    run.train()
    run.sparse.check()


def test_layers_that_begin_to_train_beside_adapters_end_the_run_at_its_next_checkpoint(tmp_path):
    class ThawAll(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                run.sparse.model.requires_grad_(True)

    run = beside_adapters(tmp_path, "get_peft_model", save_steps=4, callbacks=[ThawAll()])
    with pytest.raises(ValueError, match="PEFT adapters.*that train"):
        run.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_adapters_go_on_with_the_masks_that_they_were_trained_on(tmp_path):
    beside_adapters(tmp_path, "get_peft_model").train()
    other = beside_adapters(tmp_path, "get_peft_model")
    layer = other.sparse.layers[FROZEN[1]]
    layer.set_mask(layer.topology.flip(0))
    before = snapshot(other.sparse)
    with pytest.raises(ValueError, match=f"holds adapters alone, and the mask of {FROZEN[1]}"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert unchanged(other.sparse, before)


def test_a_wrapper_whose_checkpoints_hold_everything_trains_beside_adapters(tmp_path):
    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inside = model

        def forward(self, input_ids, labels=None):
            return self.inside(input_ids=input_ids, labels=labels)

    def run(directory, resume=None):
        model = tiny_llama()
        sparsify(model, case_config("set", sparsity=0.8))
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        model.requires_grad_(True)
        args = arguments(directory, max_steps=12, save_steps=8)
        one = SparseTrainer(model=Wrapper(adapted), args=args, train_dataset=random_blocks())
        one.train(resume_from_checkpoint=resume)
        return weights(one)

    assert same_weights(run(tmp_path / "a"), run(tmp_path / "b", str(tmp_path / "a/checkpoint-8")))


BLOCK = [f"model.layers.0.{part}" for part in [f"self_attn.{kind}_proj" for kind in "qkvo"]] + [
    f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up", "down")
]


def with_a_frozen_block(directory, config, model=None, **changes):
    run = SparseTrainer(
        model=model or tiny_llama(), args=arguments(directory, **changes), sparsity=config,
        train_dataset=random_blocks(),
    )  # fmt: skip
    freeze(run.model, BLOCK)
    return run


def sparsities(run):
    """Of the layers that train, from what was logged of all."""
    masks = run.sparse.masks()
    kept, possible = sum(run.sparse.layers[name].links for name in BLOCK), sum(mask.numel() for mask in masks.values())
    trained = sum(mask.numel() for name, mask in masks.items() if name not in BLOCK)
    return [1 - (possible * (1 - line["sparsity"]) - kept) / trained for line in run.evolver.history]


def scheduled(step, end):
    return 0.9 - 0.4 * (1 - min(step / end, 1)) ** 3


@pytest.mark.parametrize(("method", "allocation"), [("gmp", "uniform"), ("gmp", "erdos_renyi"), ("granet", "global")])
def test_no_links_come_back_in_a_longer_run_or_another(tmp_path, method, allocation, caplog):
    config = case_config(method, allocation=allocation)
    first = with_a_frozen_block(tmp_path / "first", config, save_steps=8)
    with caplog.at_level(logging.WARNING, logger="hf_chts"):
        first.train()
    assert "stays at" not in caplog.text.replace("stays as", "")
    longer = with_a_frozen_block(tmp_path / "longer", config, max_steps=48, save_steps=8)
    longer.train(resume_from_checkpoint=str(tmp_path / "first/checkpoint-8"))
    found = sparsities(longer)
    assert found == pytest.approx(sorted(found))
    stays = next(line for line in caplog.messages if "Sparsity stays" in line)
    # cubic: after step 8 of 16, and where 36 steps take it
    assert f"stays at {scheduled(8, 16):.2%}" in stays
    assert f"{scheduled(8, 36):.2%}" in stays
    if allocation == "uniform":
        expected = [scheduled(4, 16), *(max(scheduled(8, 16), scheduled(step, 36)) for step in range(8, 37, 4))]
        assert found == pytest.approx(expected, abs=2e-3)
    # a resumed run is as if it had never stopped, while its sparsity stays and after that
    for checkpoint in (16, 32):
        again = with_a_frozen_block(tmp_path / "again", config, tiny_llama(seed=7), max_steps=48, save_strategy="no")
        again.train(resume_from_checkpoint=str(tmp_path / f"longer/checkpoint-{checkpoint}"))
        assert again.evolver.plan.floor == (longer.evolver.plan.floor if checkpoint == 16 else 0)
        assert all(mask.equal(longer.sparse.masks()[name]) for name, mask in again.sparse.masks().items())
    links = {name: layer.links for name, layer in first.sparse.layers.items()}
    first.train()
    found = sparsities(first)
    assert found == pytest.approx(sorted(found))
    assert first.sparse.links() <= sum(links.values())
    if allocation != "global":  # which moves links towards the layers with the greater weights
        assert {name: layer.links for name, layer in first.sparse.layers.items()} == links

"""Links in slots and dense weights with zeros: the same runs, bit for bit, for every row of the table of methods."""

from unittest import mock

import pytest
import torch
from cases import IN_SLOTS, Invariants, all_of, case_config, differences, losses, trainer, weights
from same_choices import SameChoices
from tiny import tiny_llama

from hf_chts import sparse_model, sparsify

# The order in which a norm is summed up differs, and the fused kernel rounds the last elements of a tensor, which do
# not fill a register, otherwise than the rest
EXACT = {"max_grad_norm": 0.0, "optim": "adamw_torch"}


def dense_weights(run):
    return {name: layer.weight.detach().clone() for name, layer in run.sparse.layers.items()}


def same(first, second):
    """That two runs came to the same, whatever their storages."""
    assert losses(first) == losses(second)
    for mine, other in ((dense_weights(first), dense_weights(second)), (first.sparse.masks(), second.sparse.masks())):
        assert all(mine[name].equal(other[name]) for name in mine)
    theirs = weights(second)
    others = [name for name in weights(first) if name.rpartition(".")[0] not in first.sparse.layers]
    assert others
    assert all(weights(first)[name].equal(theirs[name]) for name in others)
    explored = first.evolver.explored, second.evolver.explored
    assert all(bits.equal(explored[1][name]) for name, bits in explored[0].items())
    assert first.evolver.softness == second.evolver.softness


@pytest.mark.parametrize("case", ["static", *IN_SLOTS])
def test_both_storages_give_the_same_run(tmp_path, case):
    runs = {}
    for storage in ("masked", "links"):
        runs[storage] = trainer(tmp_path / storage, case, storage=storage, **EXACT)
        invariants = Invariants.watch(runs[storage])
        runs[storage].train()
        assert invariants.updates == 0 if case == "static" else invariants.updates >= 4
    same(runs["masked"], runs["links"])
    # a run of links is resumed bit for bit
    again = trainer(tmp_path / "links", case, storage="links", **EXACT)
    again.train(resume_from_checkpoint=str(tmp_path / "links" / "checkpoint-10"))
    assert differences(all_of(runs["links"]), all_of(again)) == []
    # and either is resumed with the other storage
    for storage, other in (("masked", "links"), ("links", "masked")):
        crossed = trainer(tmp_path / f"to {other}", case, storage=other, **EXACT)
        crossed.train(resume_from_checkpoint=str(tmp_path / storage / "checkpoint-10"))
        same(crossed, runs[storage])


@pytest.mark.parametrize("case", ["chtss", "granet", "chtss, per-weight Adam steps"])
def test_slots_are_given_back_when_the_sparsity_has_risen(tmp_path, case):
    whole = trainer(tmp_path / "masked", case, **EXACT)
    whole.train()
    compact = {"storage": "links", "compact_after_decay": True}
    run = trainer(tmp_path / "links", case, config=compact, **EXACT)
    before = {name: layer.link_values.numel() for name, layer in run.sparse.layers.items()}
    run.train()
    same(whole, run)
    for name, layer in run.sparse.layers.items():
        assert layer.link_values.numel() == layer.links < 0.3 * before[name]
        assert not layer.storage.missing().any()
    for checkpoint in (10, 20):  # before and after they were given back
        again = trainer(tmp_path / "links", case, config=compact, **EXACT)
        again.train(resume_from_checkpoint=str(tmp_path / "links" / f"checkpoint-{checkpoint}"))
        assert differences(all_of(run), all_of(again)) == []
    with pytest.raises(ValueError, match="compact_after_decay is true, with storage 'masked'"):
        case_config(case, compact_after_decay=True)


def test_slots_are_given_back_in_a_loop_that_keeps_its_graph():
    ids, found = torch.arange(16).view(2, 8), []
    for compact in (False, True):
        model = tiny_llama()
        sparse = sparsify(model, case_config("chtss", storage="links", compact_after_decay=compact))
        optimizer = torch.optim.AdamW(model.parameters())
        evolver = sparse.evolver(optimizer, max_steps=24)
        for _ in range(24):
            loss = model(input_ids=ids, labels=ids).loss  # and with it the graph of the step before
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            evolver.step()
        for layer in sparse.layers.values():
            assert (layer.storage.vacant == 0) == compact
            assert optimizer.state[layer.parameter]["exp_avg"].shape == layer.parameter.shape
        assert len(optimizer.state) == len(list(model.parameters()))
        found.append({name: layer.weight.detach() for name, layer in sparse.layers.items()})
    for name, weight in found[0].items():
        assert weight.equal(found[1][name])


@pytest.mark.parametrize("case", ["set", "chtss"])
def test_trained_on_from_the_best_model(tmp_path, case):
    """The optimizer is kept, and its moments belong to links that are in other slots than the best model's."""
    found = []
    for storage in ("masked", "links"):
        run = trainer(
            tmp_path / storage, case, storage=storage, optim="adamw_torch", max_grad_norm=0.0, eval_strategy="steps",
            eval_steps=4, save_steps=4, load_best_model_at_end=True, metric_for_best_model="loss",
            greater_is_better=True, best_at_any_sparsity=True,
        )  # fmt: skip
        run.train()
        assert run.state.best_global_step < 24
        run.train()
        found.append((losses(run), run.sparse.masks()))
    assert found[0][0] == found[1][0]
    assert not differences(found[0][1], found[1][1])


@pytest.mark.parametrize("option", ["load_best_model_at_end", "auto_find_batch_size"])
def test_earlier_weights_do_not_fit_smaller_parameters(tmp_path, option):
    options = {option: True, "eval_strategy": "steps", "eval_steps": 10}
    run = trainer(tmp_path, "chtss", storage="links", config={"compact_after_decay": True}, **options)
    with pytest.raises(ValueError, match=f"{option} puts earlier weights back"):
        run.train()


def test_an_update_without_room_changes_nothing():
    def no_spare_slots(shapes, config, links):
        return dict(links)

    model = tiny_llama()
    with mock.patch.object(sparse_model, "most_links", no_spare_slots):
        sparse = sparsify(model, case_config("set", allocation="global", storage="links", sparsity=0.8))
    evolver = sparse.evolver(torch.optim.AdamW(model.parameters()), max_steps=24)
    with torch.no_grad():
        next(iter(sparse.layers.values())).link_values.zero_()  # so that the other layers get its links
    before = {name: (layer.link_positions.clone(), layer.link_values.clone()) for name, layer in sparse.layers.items()}
    with pytest.raises(ValueError, match=r"would give model\.layers\.\S+ \d+ links, and it has \d+ slots"):
        evolver.update(4)
    for name, layer in sparse.layers.items():
        assert layer.link_positions.equal(before[name][0])
        assert layer.link_values.equal(before[name][1])
    assert evolver.history == []


@pytest.mark.parametrize(
    ("exact", "options"),
    [
        (True, {"bf16": True}),
        (True, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
        (
            True,
            {"bf16": True, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        ),
        (False, {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
        (False, {"max_grad_norm": 0.5}),
    ],
    ids=["bf16", "checkpointed", "reentrant", "compiled", "clipped"],
)
def test_options_of_the_trainer(tmp_path, exact, options):
    runs = {
        storage: trainer(tmp_path / storage, "rigl", storage=storage, **(EXACT | {"save_strategy": "no"} | options))
        for storage in ("masked", "links")
    }
    for run in runs.values():
        run.train()
    if exact:
        same(runs["masked"], runs["links"])
    assert losses(runs["links"]) == pytest.approx(losses(runs["masked"]), rel=1e-5)


@pytest.mark.parametrize("case", [name for name in IN_SLOTS if case_config(name).removal_choice == "hard"])
def test_products_with_links_alone_give_the_same_run_within_rounding(tmp_path, case):
    pytest.importorskip("numba")
    runs, choices = {}, SameChoices(rounding=1e-3)
    for compute, deciding in (("dense", choices.noted), ("sparse", choices.taken_over)):
        runs[compute] = trainer(tmp_path / compute, case, config={"storage": "links", "compute": compute})
        invariants = Invariants.watch(runs[compute])
        with deciding():
            runs[compute].train()
        assert invariants.updates >= 4
    assert choices.taken == len(choices.first)
    assert all(layer.storage.index is not None for layer in runs["sparse"].sparse.layers.values())
    found = losses(runs["sparse"])
    assert len(found) >= 20
    assert found == pytest.approx(losses(runs["dense"]), rel=1e-4)
    for name, mask in runs["dense"].sparse.masks().items():
        assert runs["sparse"].sparse.masks()[name].equal(mask)
    again = trainer(tmp_path / "sparse", case, config={"storage": "links", "compute": "sparse"})
    with choices.taken_over():
        again.train(resume_from_checkpoint=str(tmp_path / "sparse" / "checkpoint-10"))
    assert differences(all_of(runs["sparse"]), all_of(again)) == []

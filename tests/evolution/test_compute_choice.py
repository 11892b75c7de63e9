"""compute: auto: what a measurement decides, and that it is kept."""

import pytest
import torch
from cases import all_of, case_config, differences, trainer
from tiny import tiny_llama

from hf_chts import SparsityConfig, kernels, sparsify
from hf_chts.checkpoint import load_topology
from hf_chts.evolution import compute_choice
from hf_chts.evolution.compute_choice import Measured, choose_compute

pytest.importorskip("numba")


@pytest.mark.parametrize(
    ("dense", "links", "half", "limit"),
    [
        (2.0, 1.0, 0.5, 1940),  # 0.001 a link: as fast as 0.97 of the dense product with 1,940
        (1.0, 2.0, 1.0, 485),  # slower now, and faster when there are fewer
        (1.0, 5.0, 4.0, -1015),  # never
        (1.0, 0.5, 0.6, 1000),  # a measurement that knows no slope
        (1.0, 1.5, 1.6, -1),
        (1.0, 0.99, 0.5, 979),  # no clear gain
    ],
)
def test_up_to_how_many_links(dense, links, half, limit):
    assert Measured(dense, links, half).up_to(1000) == limit


def model_with(seconds, monkeypatch, method="chtss", **fields):
    """A sparse model, whose layers of each shape are measured to take these seconds."""
    monkeypatch.setattr(compute_choice, "_measure", lambda layer, tokens, dtype: seconds(layer.storage))
    model = tiny_llama()
    return model, sparsify(model, case_config(method, storage="links", compute="auto", **fields))


def test_layers_change_over_when_they_are_sparse_enough(monkeypatch):
    # sparse pays off up to three quarters of the links at the begin, but in one kind of layer never
    def seconds(storage):
        if storage.shape == (60, 40):
            return Measured(1.0, 10.0, 9.0)
        return Measured(0.75 / 0.97, 1.0, 0.5)

    model, sparse = model_with(seconds, monkeypatch)
    optimizer = torch.optim.AdamW(model.parameters())
    evolver = sparse.evolver(optimizer, max_steps=24)
    assert all(layer.storage.index is None for layer in sparse.layers.values())
    before = {name: layer.links for name, layer in sparse.layers.items()}
    ids, changed = torch.arange(16).view(2, 8), set()
    for _ in range(24):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        evolver.step()
        for name, layer in sparse.layers.items():
            few = layer.links <= int(0.75 * before[name]) and layer.storage.shape != (60, 40)
            assert (layer.storage.index is not None) == few
            changed |= {name} if few else set()
    assert 0 < len(changed) < len(before)
    assert {name for name, limit in evolver.compute.items() if limit < 0} == set(before) - changed


def test_what_was_measured_is_kept_with_the_checkpoint(tmp_path, monkeypatch):
    calls = []

    def seconds(storage):
        calls.append(storage)
        return Measured(2.0, 1.0, 0.5)

    monkeypatch.setattr(compute_choice, "_measure", lambda layer, tokens, dtype: seconds(layer.storage))
    run = trainer(tmp_path, "set", config={"storage": "links", "compute": "auto"})
    run.train()
    assert calls
    limits = run.evolver.compute
    assert set(limits) == set(run.sparse.layers)
    assert load_topology(tmp_path / "checkpoint-10").compute == limits
    calls.clear()
    again = trainer(tmp_path, "set", config={"storage": "links", "compute": "auto"})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert not calls
    assert again.evolver.compute == limits
    assert differences(all_of(run), all_of(again)) == []
    # a loop of one's own
    model, sparse = tiny_llama(), None
    sparse = sparsify(model, case_config("set", storage="links", compute="auto"))
    evolver = sparse.evolver(torch.optim.AdamW(model.parameters()), max_steps=24)
    state = evolver.state_dict()
    assert state["compute"] == evolver.compute
    calls.clear()
    evolver.load_state_dict(state)
    assert evolver.compute == state["compute"]
    assert not calls
    # of a run that found otherwise
    evolver.load_state_dict(state | {"compute": dict.fromkeys(limits, -1)})
    assert all(layer.storage.index is None for layer in sparse.layers.values())
    evolver.load_state_dict(state | {"compute": {}})
    assert set(evolver.compute) == set(limits)


def test_the_line_that_is_logged(monkeypatch):
    model, sparse = model_with(lambda storage: Measured(3.0, 1.0, 0.5), monkeypatch, method="set")
    said = []
    evolver = sparse.evolver(torch.optim.AdamW(model.parameters()), max_steps=24)
    evolver.close()
    evolver.begin(24, torch.optim.AdamW(model.parameters()), tokens=77, say=said.append)
    assert said == [
        "compute: auto: 14 of 14 layers multiply with their links alone, 3.0 times as fast as densely "
        "(measured with 77 tokens in float32)"
    ]


def test_where_there_is_nothing_to_measure(monkeypatch):
    _, sparse = model_with(None, monkeypatch)
    final = {name: layer.links for name, layer in sparse.layers.items()}
    limits, line = choose_compute(sparse.layers, final, 64, torch.float16)
    assert set(limits.values()) == {-1}
    assert "in float32 or bfloat16, and these are in torch.float16" in line
    monkeypatch.setattr(kernels, "available", lambda: False)
    assert "because numba is not there" in choose_compute(sparse.layers, final, 64, torch.float32)[1]


def test_a_real_measurement():
    model = tiny_llama()
    sparse = sparsify(model, case_config("static", storage="links", compute="auto"))
    evolver = sparse.evolver(torch.optim.AdamW(model.parameters()), max_steps=24, tokens=8)
    for name, layer in sparse.layers.items():
        assert -1 <= evolver.compute[name] <= layer.storage.room
        assert (layer.storage.index is not None) == (layer.links <= evolver.compute[name])


def test_compute_needs_links():
    for compute in ("sparse", "auto"):
        with pytest.raises(ValueError, match=f"compute is '{compute}', with storage 'masked'"):
            SparsityConfig("set", compute=compute)
    with pytest.raises(ValueError, match="unknown compute 'fast'"):
        SparsityConfig("set", storage="links", compute="fast")

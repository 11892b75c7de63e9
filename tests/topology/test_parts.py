"""Parts of a user's own: registered, named in checkpoints, and missed with a clear sentence."""

import json
import subprocess
import sys

import pytest
import torch
from cases import arguments, losses
from tiny import random_blocks, tiny_llama

from hf_chts import SparseTrainer, SparsityConfig, register, sparsify
from hf_chts.evolution.update import TopologyUpdate
from hf_chts.report.run import read_run
from hf_chts.topology import parts
from hf_chts.topology.parts import import_parts


@pytest.fixture
def own():
    """Registries that forget what a test registers."""
    registries = (parts.REMOVAL, parts.REGROWTH, parts.INITIAL_TOPOLOGIES, parts.SPARSITY_SCHEDULES, parts.METHODS)
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


def train(directory, config, steps=8):
    run = SparseTrainer(
        model=tiny_llama(),
        args=arguments(directory, max_steps=steps, update_warmup_steps=0),
        sparsity=config,
        train_dataset=random_blocks(),
    )
    run.train()
    return run


def test_every_kind_of_part(own, tmp_path):
    seen = {}

    @register.regrowth("corner")
    def corner(mask, weight, grad):
        seen["regrowth"] = weight[mask].ne(0).any() and weight[~mask].eq(0).all() and grad.shape == mask.shape
        return torch.arange(mask.numel(), 0, -1.0).view(mask.shape)  # the first missing links come

    @register.removal("newest")
    def newest(mask, weight):
        return torch.arange(mask.numel(), 0, -1.0).view(mask.shape) * mask  # the last links go

    @register.initial_topology("stripes", options={"every": "update_interval"})
    def stripes(out_features, in_features, links, every, generator):
        mask = torch.zeros(out_features * in_features, dtype=torch.bool)
        mask[:links] = True
        seen["every"] = every
        return mask.view(out_features, in_features)

    @register.sparsity_schedule("jump")
    def jump(step, start, end, initial, final):
        return initial if step < end else final

    register.method(
        "own", regrowth="corner", removal="newest", initial_topology="stripes", sparsity_schedule="jump",
        initial_sparsity=0.5, drop_schedule="constant", pruning="newest",
    )  # fmt: skip
    config = SparsityConfig("own", sparsity=0.75, update_interval=2)
    assert config.needs_gradient
    run = train(tmp_path, config)
    assert seen == {"regrowth": True, "every": 2}
    assert [line["sparsity"] for line in run.evolver.history] == pytest.approx([0.5, 0.5, 0.75], abs=1e-3)
    # links go at the end and come at the begin, so they stay where they are
    for name, mask in run.sparse.masks().items():
        links = round(mask.numel() / 4)
        assert mask.flatten().nonzero().flatten().tolist() == list(range(links)), name


def test_what_a_part_cannot_have(own):
    with pytest.raises(ValueError, match="asks for .'colour'., but a regrowth can have"):
        register.regrowth("odd")(lambda mask, colour: mask)
    with pytest.raises(ValueError, match="there is a regrowth 'gradient' already, from hf_chts"):
        register.regrowth("gradient")(lambda mask: mask)
    with pytest.raises(ValueError, match="there is no regrowth 'new' to sample for"):
        register.sampler("new")(lambda mask, k, generator: mask)
    for _ in range(2):  # as a notebook's cell that is run again
        register.regrowth("again")(lambda mask: mask)


MODULE = """
from hf_chts import register

@register.regrowth("strength_of_mine")
def strength_of_mine(mask, weight):
    size = weight.abs()
    return size.sum(1, keepdim=True) * size.sum(0, keepdim=True)
"""


def test_a_module_of_parts_is_named_and_missed(own, tmp_path, monkeypatch):
    (tmp_path / "my_parts_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = SparsityConfig("set", regrowth="strength_of_mine", update_interval=2, parts=["my_parts_of_a_test"])
    whole = train(tmp_path / "run", config)
    saved = json.loads((tmp_path / "run" / "checkpoint-8" / "sparsity_config.json").read_text())
    assert saved["parts"] == ["my_parts_of_a_test"]
    assert SparsityConfig.load(tmp_path / "run" / "checkpoint-8") == config
    # a script of its own, that registers without naming a module, names it all the same
    assert SparsityConfig("set", regrowth="strength_of_mine", update_interval=2).parts == ["my_parts_of_a_test"]
    assert losses(whole)
    there = "from hf_chts import SparsityConfig; SparsityConfig.load('run/checkpoint-8')"
    done = subprocess.run([sys.executable, "-c", there], cwd=tmp_path, capture_output=True, text=True)
    assert "regrowth 'strength_of_mine' is not registered: import my_parts_of_a_test first" in done.stderr
    subprocess.run([sys.executable, "-c", f"import my_parts_of_a_test; {there}"], cwd=tmp_path, check=True)
    monkeypatch.delitem(sys.modules, "my_parts_of_a_test")


def test_a_file_has_no_module_imported(tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text("raise SystemExit('it ran')")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"log_history": []}')
    values = SparsityConfig().to_dict()
    for named in (["hostile"], ["hostile.py"], [str(tmp_path / "hostile.py")]):
        assert SparsityConfig.from_dict(values | {"parts": named}).parts == named
        with pytest.raises(ValueError, match="regrowth 'theirs' is not registered"):
            SparsityConfig.from_dict(values | {"parts": named, "regrowth": "theirs"})
        (tmp_path / "sparsity_config.json").write_text(json.dumps(values | {"parts": named, "new_field": 1}))
        assert read_run(tmp_path).config.method == "chtss"  # a report, which reads what it can
    for named in ("hostile", [["hostile"]], 5):
        with pytest.raises(ValueError, match="it must be a list of module names"):
            SparsityConfig.from_dict(values | {"parts": named})


def test_a_method_may_set_any_field(own):
    register.method("mine", update_interval=7, percolation=True, sigmoid_k=4.0, sparsity_schedule="sigmoid")
    config = SparsityConfig("mine", sigmoid_k=5.0)
    assert (config.update_interval, config.percolation, config.sigmoid_k) == (7, True, 5.0)
    register.method("typo", drop_fracton=0.2)
    with pytest.raises(ValueError, match="method 'typo' sets 'drop_fracton', which is not a field"):
        SparsityConfig("typo")


def test_dense_gradients_are_kept_for_any_score_that_needs_them():
    # with global allocation layers are pruned at constant sparsity too
    assert SparsityConfig("set", pruning="mest", allocation="global").needs_gradient
    assert not SparsityConfig("set").needs_gradient


def test_a_part_that_returns_something_else_is_named(own):
    register.initial_topology("one_short")(
        lambda out_features, in_features, links: (
            torch.arange(out_features * in_features).view(out_features, -1) < links - 1
        )
    )
    with pytest.raises(ValueError, match=r"initial_topology 'one_short' returned torch.bool .* with 159 links; .* 160"):
        sparsify(tiny_llama(), SparsityConfig("static", initial_topology="one_short"))
    register.regrowth("rows")(lambda weight: weight.abs().sum(1))
    config = SparsityConfig("set", regrowth="rows", update_interval=1)
    mask = torch.eye(4, dtype=torch.bool)
    update = TopologyUpdate(config.plan(10), 1, {"layer": mask}, {"layer": 6}, {}, {})
    with pytest.raises(
        ValueError, match=r"'rows' returned torch.float32 \(4,\); it must return floating point \(4, 4\)"
    ):
        update.evolve(["layer"], {"layer": mask.float()})


def test_removal_sees_the_weights_that_pruning_left(own):
    seen = []

    @register.removal("watched")
    def watched(mask, weight):
        seen.append(weight.ne(0).equal(mask))
        return weight.abs()

    config = SparsityConfig("set", removal="watched", update_interval=1, drop_fraction=0.5)
    weight = torch.arange(1.0, 17).view(4, 4)
    full = torch.ones(4, 4, dtype=torch.bool)
    TopologyUpdate(config.plan(10), 1, {"layer": full}, {"layer": 8}, {}, {}).evolve(["layer"], {"layer": weight})
    assert seen == [True]


def test_a_module_that_cannot_be_imported(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ValueError, match="'no_such_module' cannot be imported: ModuleNotFoundError"):
        SparsityConfig(parts=["no_such_module"])
    with pytest.raises(ValueError, match="broken.py' cannot be imported: ZeroDivisionError"):
        import_parts([str(tmp_path / "broken.py")])
    assert "broken" not in sys.modules
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ValueError, match="another module is called 'json': rename the file"):
        import_parts([str(tmp_path / "json.py")])


def test_files_without_parts_say_nothing_of_them(tmp_path):
    SparsityConfig().save(tmp_path / "config.json")
    assert "parts" not in json.loads((tmp_path / "config.json").read_text())
    sparsify(tiny_llama(), SparsityConfig.load(tmp_path / "config.json"))


@pytest.mark.parametrize("module", ["topology", "topology.percolation", "topology.link_sampling", "topology.gmp"])
def test_topology_needs_torch_and_numpy_alone(module):
    heavy = {"transformers", "datasets", "accelerate"}
    code = f"import hf_chts.{module}, sys; print({heavy} & {{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

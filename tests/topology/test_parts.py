"""Parts of a user's own: registered, named in checkpoints, and missed with a clear sentence."""

import json
import subprocess
import sys

import pytest
import torch
from cases import arguments, losses
from tiny import random_blocks, tiny_llama

from hf_chts import SparseTrainer, SparsityConfig, register, sparsify
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
    assert "needs parts that are registered by 'my_parts_of_a_test'" in done.stderr.splitlines()[-1]
    done = subprocess.run([sys.executable, "-c", f"import my_parts_of_a_test; {there}"], cwd=tmp_path, check=True)
    monkeypatch.delitem(sys.modules, "my_parts_of_a_test")


def test_a_module_that_cannot_be_imported(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ValueError, match="'no_such_module' cannot be imported: ModuleNotFoundError"):
        SparsityConfig(parts=["no_such_module"])
    with pytest.raises(ValueError, match="broken.py' cannot be imported: ZeroDivisionError"):
        import_parts([str(tmp_path / "broken.py")])
    assert "broken" not in sys.modules


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

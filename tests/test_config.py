"""SparsityConfig: defaults by method, both formats, and what is refused."""

import json

import pytest

from hf_chts import SparsityConfig
from hf_chts.methods import METHODS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_saved_and_loaded_again(tmp_path, method, suffix):
    config = SparsityConfig(method=method, topology_seed=7, target_modules=["q_proj", r".*mlp\.up_proj"])
    config.save(tmp_path / f"config.{suffix}")
    assert SparsityConfig.load(tmp_path / f"config.{suffix}") == config
    assert SparsityConfig.from_dict(config.to_dict()) == config


def test_a_directory_stands_for_its_config_file(tmp_path):
    config = SparsityConfig(sparsity=0.7)
    config.save(tmp_path)
    assert json.loads((tmp_path / "sparsity_config.json").read_text())["sparsity"] == 0.7
    assert SparsityConfig.load(tmp_path) == config


def test_defaults_come_from_the_method():
    chtss, chts, plain = (SparsityConfig(method=m) for m in ("chtss", "chts", "set"))
    assert (chtss.initial_topology, chtss.removal_choice, chtss.regrowth, chtss.regrowth_choice) == (
        "bipartite_receptive_field",
        "soft",
        "ch2_l3n",
        "soft",
    )
    assert (chtss.initial_sparsity, chtss.sparsity_schedule, chtss.sparsity_schedule_until) == (0.5, "sigmoid", 0.375)
    assert (chts.initial_sparsity, chts.sparsity_schedule) == (0.9, "constant")
    assert (plain.initial_topology, plain.removal_choice, plain.regrowth) == ("erdos_renyi", "hard", "random")
    assert SparsityConfig(method="dense").is_dense
    assert not SparsityConfig(method="static").evolves
    assert SparsityConfig(method="chts", regrowth="random").regrowth == "random"


# what the methods' own papers say that the comparison paper does not
PAPERS = {
    "set": {
        "allocation": "erdos_renyi", "removal": "magnitude_by_sign", "drop_fraction": 0.3, "drop_schedule": "constant",
        "update_until": 1.0, "sparsity_schedule_until": 1.0,
    },
    "rigl": {"allocation": "erdos_renyi", "drop_fraction": 0.3},
    "gmp": {"initial_sparsity": 0.0},
    "topk": {"rate_by_density": "inverse_sqrt"},
    "dense": {}, "static": {}, "chts": {}, "chtss": {},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_recipes(tmp_path, method):
    paper = SparsityConfig(method=method)
    assert (paper.recipe, paper.allocation) == ("paper", "uniform")
    assert SparsityConfig(method=method, recipe="comparison") == paper  # as files of 0.1.0 have it
    if method not in PAPERS:
        with pytest.raises(ValueError, match=f"recipe is 'original'.* method is '{method}'"):
            SparsityConfig(method=method, recipe="original")
        return
    original = SparsityConfig(method=method, recipe="original")
    before, after = paper.to_dict(), original.to_dict()
    assert {name: after[name] for name in after if after[name] != before[name]} == PAPERS[method] | {
        "recipe": "original"
    }
    original.save(tmp_path)
    assert SparsityConfig.load(tmp_path) == original


def test_a_score_in_place_of_random_regrowth_is_hard_unless_it_is_said():
    assert SparsityConfig("set").regrowth_choice == SparsityConfig("set", regrowth="random").regrowth_choice == "soft"
    for method in ("set", "smet", "mest"):
        assert SparsityConfig(method, regrowth="gradient").regrowth_choice == "hard"
        assert SparsityConfig(method, regrowth="gradient", regrowth_choice="soft").regrowth_choice == "soft"
    assert SparsityConfig("chts", regrowth="gradient").regrowth_choice == "soft"


def test_what_is_set_wins_over_the_recipe():
    config = SparsityConfig(method="set", recipe="original", drop_fraction=0.1, allocation="uniform")
    assert (config.drop_fraction, config.allocation, config.removal) == (0.1, "uniform", "magnitude_by_sign")
    assert SparsityConfig(method="rigl", recipe="original", update_until=0.5).update_until == 0.5


def test_a_config_that_was_saved_before_there_were_recipes(tmp_path):
    values = SparsityConfig(method="set", sparsity=0.7).to_dict()
    del values["recipe"]
    (tmp_path / "sparsity_config.json").write_text(json.dumps(values))
    assert SparsityConfig.load(tmp_path) == SparsityConfig(method="set", sparsity=0.7)


def test_a_sparsity_may_stay_where_the_method_is_changed_to_dense(monkeypatch):
    assert SparsityConfig(method="dense", sparsity=0.9) == SparsityConfig(method="dense")
    # what is dense is known from its registration
    monkeypatch.setitem(METHODS, "whole", METHODS["dense"])
    assert SparsityConfig(method="whole", sparsity=0.9).is_dense


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "chtz"}, "unknown method 'chtz'; did you mean 'cht'?"),
        ({"sparsity": 1.0}, "sparsity is 1.0; .* For a dense model use method: dense"),
        ({"sparsity": 90}, "sparsity is 90.0; .*0.9 keeps 10% of the links"),
        ({"sparsity": "9e-1"}, "sparsity is '9e-1'; it must be a number: leave out the quotes"),
        ({"sparsity": True}, "sparsity is True; it must be a number"),
        ({"method": ["set"]}, "method is .'set'.; it must be text"),
        ({"initial_sparsity": 1.2}, "initial_sparsity is 1.2"),
        ({"method": "set", "initial_sparsity": 0.5}, "initial_sparsity is 0.5 and sparsity 0.9, .* 'constant'"),
        ({"method": "static", "sparsity_schedule": "cubic"}, "'cubic', but method 'static' never updates"),
        ({"sparsity_schedule_until": 0.9}, "0.9 of the run, after the last topology update at 0.75"),
        ({"update_interval": 0}, "update_interval is 0"),
        ({"update_interval": 2.5}, "update_interval is 2.5; it must be a whole number"),
        ({"update_until": 1.5}, r"update_until is 1.5; it must lie in \[0, 1\]"),
        ({"softness_end": 1.0}, "softness_end is 1.0"),
        ({"sigmoid_k": 0}, "sigmoid_k is 0.0"),
        ({"removal": "ch2"}, "unknown removal 'ch2'.*magnitude"),
        ({"target_modules": ["*proj"]}, "which is not a regular expression"),
        ({"target_modules": []}, "must be a list of module names"),
        (
            {"method": "mest", "initial_sparsity": 0.5},
            "initial_sparsity is 0.5 and sparsity 0.9, .* 'elastic' starts 0.05 below",
        ),
        ({"recipe": "orginal"}, "unknown recipe 'orginal'; did you mean 'original'?"),
        ({"percolation": "yes"}, "percolation is 'yes'; it must be true or false"),
        ({"method": "gmp", "percolation": True}, "percolation is true, but regrowth 'stored'"),
        ({"regrowth": "stored"}, "Set regrown_weights: historical"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        SparsityConfig(**values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sparsty": 0.9}', "unknown field 'sparsty'; did you mean 'sparsity'?"),
        ('{"version": 2}', "version 2, this hf_chts reads 1 to 1: upgrade"),
        ("[1]", "is a mapping of fields, got a list"),
        ("{", "sparsity_config.json"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "sparsity_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        SparsityConfig.load(tmp_path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sparsity config at .*nowhere"):
        SparsityConfig.load(tmp_path / "nowhere")

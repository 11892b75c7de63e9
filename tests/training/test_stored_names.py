"""Resuming models whose weights are stored under other names, and in other pieces, than in the model."""

import pytest
from architecture_trainer import trainer
from safetensors.torch import load_file
from tiny_architectures import ARCHITECTURES

STORED = {"mixtral": "experts.0.", "llava": "language_model.", "vit": ".attention.attention."}


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(first[key].equal(value) for key, value in second.items())


@pytest.mark.parametrize("storage", ["masked", "links"])
@pytest.mark.parametrize("to", ["masked", "links"])
@pytest.mark.parametrize("name", STORED)
def test_a_run_is_resumed_from_either_storage(tmp_path, name, storage, to):
    def run(storage, **changes):
        settings = {"save_strategy": "steps", "save_steps": 6, "optim": "adamw_torch", "max_grad_norm": 0.0}
        return trainer(name, tmp_path, "set", config={"storage": storage}, **settings, **changes)

    whole = run(storage)
    whole.train()
    resumed = run(to)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for name, layer in whole.sparse.layers.items():
        assert resumed.sparse.layers[name].weight.equal(layer.weight), name


@pytest.mark.parametrize("method", ["set", "dense"])
@pytest.mark.parametrize("name", STORED)
def test_a_checkpoint_is_loaded_whole(tmp_path, name, method):
    run = trainer(name, tmp_path, method, max_steps=4, save_strategy="steps", save_steps=4)
    run.train()
    checkpoint = tmp_path / "checkpoint-4"
    stored = load_file(checkpoint / "model.safetensors")
    assert any(STORED[name] in key for key in stored)
    assert stored.keys() - run.model.state_dict().keys()
    # in one file and in several
    run.model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    for directory in (checkpoint, tmp_path / "sharded"):
        again = trainer(name, tmp_path / "again", method, ARCHITECTURES[name].model(seed=5))
        assert not same(again.model, run.model)
        again._load_from_checkpoint(str(directory))
        assert same(again.model, run.model)


@pytest.mark.parametrize("name", ["mixtral", "llava"])
def test_the_best_model_is_loaded_whole_with_links(tmp_path, name):
    often = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    worst = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    links = {"config": {"storage": "links"}}
    run = trainer(name, tmp_path, "set", load_best_model_at_end=True, **links, **worst, **often)
    run.train()
    assert run.evaluate()["eval_loss"] == run.state.best_metric


@pytest.mark.parametrize("name", ["mixtral", "llava"])
def test_the_best_model_is_loaded_whole(tmp_path, name):
    worst = {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # an early one, not the last
    often = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    run = trainer(name, tmp_path, "set", load_best_model_at_end=True, **worst, **often)
    run.train()
    best = run.state.best_model_checkpoint
    assert best != str(tmp_path / "checkpoint-12")
    assert same(run.model, ARCHITECTURES[name].kind.from_pretrained(best))

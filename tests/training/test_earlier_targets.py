"""Checkpoints and exports of versions that had more layers sparse by default: what they have goes on as it was."""

import pytest
import torch
from cases import arguments, case_config, differences, losses, same_weights, weights
from safetensors.torch import load_file
from tiny import random_blocks
from transformers import MambaConfig, MambaForCausalLM

from hf_chts import SparseTrainer, SparsityHandle, export_sparse, load_sparse, sparsify
from hf_chts.layers import targets

ALL = ["in_proj", "x_proj", "dt_proj", "out_proj"]


def mamba(seed=0):
    torch.manual_seed(seed)
    return MambaForCausalLM(
        MambaConfig(vocab_size=96, hidden_size=32, state_size=8, num_hidden_layers=2, time_step_rank=16)
    )


def trainer(directory, seed=0, model=None, **changes):
    return SparseTrainer(
        model=mamba(seed) if model is None else model,
        args=arguments(directory, max_steps=16, save_steps=8, update_warmup_steps=0),
        sparsity=case_config("chtss, per-weight Adam steps", sparsity=0.8, update_interval=2, **changes),
        train_dataset=random_blocks(16, 8),
    )


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A run of the default of then, and its directory."""
    directory = tmp_path_factory.mktemp("earlier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "_why_dense", lambda *_: None)
        run = trainer(directory)
    assert run.sparse.config.target_modules is None
    run.train()
    export_sparse(run.model, directory / "plain")
    export_sparse(run.model, directory / "packed", packed=True)
    return run, directory


def kinds(sparse):
    return [name.rpartition(".")[2] for name in sparse.layers]


def test_resumed_with_the_layers_that_it_has(tmp_path, earlier):
    whole, directory = earlier
    assert kinds(whole.sparse) == ALL * 2
    run = trainer(tmp_path, seed=5)
    assert kinds(run.sparse) == ["in_proj", "out_proj"] * 2
    run.train(resume_from_checkpoint=str(directory / "checkpoint-8"))
    assert kinds(run.sparse) == ALL * 2
    assert losses(run) == losses(whole)
    assert same_weights(weights(run), weights(whole))
    assert not differences(run.sparse.masks(), whole.sparse.masks())
    assert not differences(run.evolver.explored, whole.evolver.explored)
    last = [load_file(place / "checkpoint-16/masks.safetensors") for place in (tmp_path, directory)]
    assert not differences(*last)
    # and from what that wrote
    again = trainer(tmp_path / "again", seed=6)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    assert same_weights(weights(again), weights(whole))


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_exports(tmp_path, earlier, kind):
    whole, directory = earlier
    model = load_sparse(directory / kind)
    sparse = SparsityHandle.of(model)
    assert kinds(sparse) == ALL * 2
    assert not differences(sparse.masks(), whole.sparse.masks())
    ids = torch.arange(16).view(2, 8)
    with torch.no_grad():
        assert model.eval()(input_ids=ids).logits.equal(whole.model.eval()(input_ids=ids).logits)
    export_sparse(model, tmp_path / "again", packed=kind == "packed")
    assert kinds(SparsityHandle.of(load_sparse(tmp_path / "again"))) == ALL * 2
    run = trainer(tmp_path / "run", model=model)
    run.train()
    assert kinds(run.sparse) == ALL * 2
    sparse.check()


def test_masks_of_any_other_layers_are_refused(tmp_path, earlier):
    whole, directory = earlier
    masks = {name: mask.clone() for name, mask in whole.sparse.masks().items() if "0.mixer.x_proj" not in name}
    with pytest.raises(ValueError, match="not those of this model and config"):
        sparsify(mamba(), whole.sparse.config, masks=masks)
    for changes in ({"target_modules": ["in_proj", "out_proj"]}, {"exclude_modules": ["x_proj", "dt_proj"]}):
        run = trainer(tmp_path, **changes)
        with pytest.raises(ValueError, match=r"are of another model or config: .*x_proj|dt_proj"):
            run.train(resume_from_checkpoint=str(directory / "checkpoint-8"))
        assert kinds(run.sparse) == ["in_proj", "out_proj"] * 2


def test_with_links_in_slots(tmp_path, earlier):
    whole, directory = earlier
    run = trainer(tmp_path / "links", seed=5, storage="links")
    run.train(resume_from_checkpoint=str(directory / "checkpoint-8"))
    assert {type(layer).__name__ for layer in run.sparse.layers.values()} == {"LinkedLinear"}
    again = trainer(tmp_path / "again", seed=6, storage="links")
    again.train(resume_from_checkpoint=str(tmp_path / "links" / "checkpoint-16"))
    for name, mask in whole.sparse.masks().items():
        assert run.sparse.layers[name].topology.equal(mask)
        assert again.sparse.layers[name].topology.equal(mask)

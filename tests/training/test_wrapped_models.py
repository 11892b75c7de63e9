"""Whatever a model is wrapped in, its layers have the names of the model itself, in files too."""

import json
import shutil

import pytest
import torch
from cases import arguments, case_config, losses, trainer
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, random_blocks, tiny_llama
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM

from hf_chts import SparseTrainer, SparsityConfig, SparsityHandle, export_sparse, sparsify
from hf_chts.checkpoint import TopologyState, load_topology, save_topology, with_original_names
from hf_chts.checkpoint.seal import SEAL_NAME, seal

IDS = torch.arange(30).view(2, 15) % VOCABULARY


class Wrapper(nn.Module):
    """As libraries have them that speed a model up."""

    def __init__(self, model):
        super().__init__()
        self.optimized = model

    def forward(self, input_ids, labels=None):
        return self.optimized(input_ids=input_ids, labels=labels)


def compiled(module):
    return torch.compile(module, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def each_block(wrap):
    def wrapped(model):
        for index, block in enumerate(model.model.layers):
            model.model.layers[index] = wrap(block)
        return model

    return wrapped


def one_layer(model):
    model.model.layers[1].mlp.up_proj = compiled(model.model.layers[1].mlp.up_proj)
    return model


WRAPPED = {
    "compiled": compiled,
    "compiled in place": in_place,
    "compiled blocks": each_block(compiled),
    "a compiled layer": one_layer,
    "checkpointed blocks": each_block(checkpoint_wrapper),
    "both": lambda model: compiled(each_block(checkpoint_wrapper)(model)),
    "data parallel": nn.DataParallel,
    "another wrapper": Wrapper,
    "compiled and wrapped": lambda model: Wrapper(compiled(model)),
}


@pytest.mark.parametrize(
    ("name", "first"),
    [*((name, False) for name in WRAPPED), *((name, True) for name in ("compiled", "checkpointed blocks"))],
)
def test_names_and_exports(tmp_path, name, first):
    wrap = WRAPPED[name]
    plain = sparsify(tiny_llama(), SparsityConfig())
    model = tiny_llama()
    if first:
        sparse = sparsify(model, SparsityConfig())
        wrapped = wrap(model)
    else:
        wrapped = wrap(model)
        sparse = sparsify(wrapped, SparsityConfig())
    assert list(sparse.layers) == list(plain.layers)
    assert SparsityHandle.of(wrapped) is SparsityHandle.of(model) is sparse
    for name, mask in plain.masks().items():
        assert sparse.masks()[name].equal(mask)
    export_sparse(wrapped, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == plain.model.state_dict().keys()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    with torch.no_grad():
        logits = wrapped.eval()(input_ids=IDS, labels=IDS).logits
        assert AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=IDS).logits.equal(logits)
    sparse.unsparsify()
    assert SparsityHandle.of(wrapped) is None


@pytest.mark.parametrize(
    "config", [SparsityConfig(percolation=True), SparsityConfig(target_modules=["down_proj", r"model\.layers\.0\..*"])]
)
def test_what_depends_on_names(config):
    expected = sparsify(tiny_llama(), config).layers
    for wrap in WRAPPED.values():
        assert list(sparsify(wrap(tiny_llama()), config).layers) == list(expected)


def test_a_model_with_weights_of_its_own_around_another_is_no_wrapper():
    class Valued(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.value = tiny_llama(), nn.Linear(40, 1)

    names = list(sparsify(Valued(), SparsityConfig()).layers)
    assert names[0] == "model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped, and its directory."""
    directory = tmp_path_factory.mktemp("whole")
    run = trainer(directory, "chtss, per-weight Adam steps", eval_strategy="steps", eval_steps=10)
    run.train()
    return run, directory


def resumed(directory, checkpoint, wrap):
    run = trainer(directory, "chtss, per-weight Adam steps", model=wrap(tiny_llama(seed=5)))
    run.train(resume_from_checkpoint=str(checkpoint))
    return run


def check_same(run, whole):
    assert losses(run) == losses(whole)
    for (name, value), other in zip(run.sparse.model.named_parameters(), whole.model.parameters(), strict=True):
        assert value.equal(other), name
    for name, mask in whole.sparse.masks().items():
        assert run.sparse.masks()[name].equal(mask)


@pytest.mark.parametrize("wrap", [compiled, each_block(checkpoint_wrapper)])
def test_a_run_goes_on_with_and_without_the_wrapper(tmp_path, whole, wrap):
    plain, directory = whole
    run = trainer(
        tmp_path, "chtss, per-weight Adam steps", model=wrap(tiny_llama()), eval_strategy="steps", eval_steps=10
    )
    run.train()
    check_same(run, plain)
    evaluations = [[e["eval_loss"] for e in one.state.log_history if "eval_loss" in e] for one in (run, plain)]
    assert evaluations[0] == evaluations[1]
    assert len(evaluations[0]) == 3  # at the end too
    files = ["checkpoint-10/model.safetensors", "checkpoint-10/masks.safetensors"]
    for file in files:
        first, second = load_file(tmp_path / file), load_file(directory / file)
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first)
    (own, *updates), (of_whole, *expected) = (
        (folder / "topology/layers.jsonl").read_text().splitlines() for folder in (tmp_path, directory)
    )
    assert updates == expected
    assert {**json.loads(own), "run": ""} == {**json.loads(of_whole), "run": ""}
    check_same(resumed(tmp_path / "a", directory / "checkpoint-10", wrap), plain)
    check_same(resumed(tmp_path / "b", tmp_path / "checkpoint-10", lambda model: model), plain)


def test_a_checkpoint_that_has_the_names_of_a_compiled_model(tmp_path, whole):
    plain, directory = whole
    old = tmp_path / "checkpoint-10"
    shutil.copytree(directory / "checkpoint-10", old)
    weights = load_file(old / "model.safetensors")
    save_file(
        {f"_orig_mod.{key}": value for key, value in weights.items()}, old / "model.safetensors", {"format": "pt"}
    )
    state = load_topology(old)
    for kind in ("masks", "shapes", "explored", "born"):
        setattr(state, kind, {f"_orig_mod.{name}": value for name, value in getattr(state, kind).items()})
    save_topology(old, state)
    (old / SEAL_NAME).unlink()
    seal(old, 10)
    check_same(resumed(tmp_path / "a", old, lambda model: model), plain)


def test_names_of_an_earlier_version_under_a_wrapper():
    mask = torch.ones(1, 1, dtype=torch.bool)
    state = TopologyState({f"optimized.model.{n}": mask for n in "ab"}, softness={"optimized.model.a": 0.5})
    found = with_original_names(state, ["model.a", "model.b"])
    assert list(found.masks) == ["model.a", "model.b"]
    assert found.softness == {"model.a": 0.5}
    assert list(with_original_names(state, ["x.a", "x.b"]).masks) == list(state.masks)


def test_the_best_model_of_a_compiled_run(tmp_path):
    run = SparseTrainer(
        model=each_block(compiled)(tiny_llama()),
        args=arguments(
            tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=4, save_steps=4,
            greater_is_better=True, metric_for_best_model="loss", max_steps=16,
        ),
        sparsity=case_config("set"),
        train_dataset=random_blocks(),
        eval_dataset=random_blocks(8),
    )  # fmt: skip
    run.train()
    best = load_file(f"{run.state.best_model_checkpoint}/model.safetensors")
    assert not run.state.best_model_checkpoint.endswith("checkpoint-16")
    for name, value in run.sparse.model.state_dict().items():
        assert value.equal(best[name.replace("_orig_mod.", "")])


def test_ddp_is_told_of_masks_by_the_names_that_it_sees():
    for wrap in WRAPPED.values():
        wrapped = wrap(tiny_llama())
        sparsify(wrapped, SparsityConfig()).ignore_masks_in_ddp(wrapped)
        buffers = {name for name, _ in wrapped.named_buffers() if name.endswith(".mask")}
        assert set(wrapped._ddp_params_and_buffers_to_ignore) == buffers
        assert len(buffers) == 14

"""Pushes of the Trainer to a local stub of the Hub: every strategy, and what failures do to a run."""

import logging
from types import SimpleNamespace

import pytest
import torch
from cases import Stop, same_weights, trainer, weights
from huggingface_hub import ModelCard
from transformers import TrainerCallback

from hf_chts import SparsityHandle, load_sparse
from hf_chts.checkpoint import load_masks
from hf_chts.checkpoint.seal import SEAL_NAME, verify_seal
from hf_chts.export import PushFailed, push_directory

MODEL = {"config.json", "generation_config.json", "model.safetensors", "masks.safetensors", "sparsity_config.json"}
MODEL |= {"README.md"}


def run(directory, **changes):
    """16 steps, with checkpoints after 8 and 16."""
    settings = {"max_steps": 16, "save_steps": 8, "push_to_hub": True, "hub_model_id": "me/run", "seed": 5}
    return trainer(directory, **(settings | {"hub_always_push": True} | changes))


def pulled(files, directory):
    """Files of a repository as a pull would write them."""
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def folder(files, name):
    return {file.removeprefix(f"{name}/"): content for file, content in files.items() if file.startswith(f"{name}/")}


def commits(hub):
    return [(message, files) for _, message, files in hub.repositories["me/run"].branches["main"][1:]]


def test_every_save(hub, waits, tmp_path):
    trained = run(tmp_path / "run", hub_strategy="every_save", eval_strategy="steps", eval_steps=8)
    trained.train()
    assert [message for message, _ in commits(hub)] == ["Training in progress, step 8", "Training in progress, step 16"]
    for step, (_, files) in zip((8, 16), commits(hub), strict=True):
        assert files.keys() == MODEL | {".gitattributes"}
        checkpoint = tmp_path / f"run/checkpoint-{step}"
        for name in MODEL - {"README.md"}:
            assert files[name] == (checkpoint / name).read_bytes(), name
        model = load_sparse(pulled(files, tmp_path / f"pulled-{step}"))
        masks = load_masks(checkpoint).masks
        assert all(mask.equal(masks[name]) for name, mask in SparsityHandle.of(model).masks().items())
        card = ModelCard(files["README.md"].decode())
        assert f"| optimizer steps | {'8 of 16' if step == 8 else '16'} |" in card.text
        assert "| learning rate | 0.01 |" in card.text
        assert 'from_pretrained("me/run")' in card.text
        logged = next(e["eval_loss"] for e in trained.state.log_history if e.get("step") == step and "eval_loss" in e)
        assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("loss", logged)]
    assert same_weights(weights(trained), dict(model.state_dict()))
    assert not list((tmp_path / "run").glob(".hub_push*"))
    assert not (tmp_path / "run/README.md").exists()  # nothing is copied out of the checkpoints


def test_checkpoint_is_resumed_by_another(hub, waits, tmp_path):
    whole = run(tmp_path / "whole", push_to_hub=False)
    whole.train()

    hub.create("me/run", {"last-checkpoint/rng_state_7.pth": b"of eight ranks"})

    run(tmp_path / "first", hub_strategy="checkpoint", callbacks=[Stop(8)]).train()
    files = hub.files("me/run")
    assert files.keys() >= MODEL
    assert folder(files, "last-checkpoint") == contents(tmp_path / "first/checkpoint-8")
    directory = pulled(files, tmp_path / "elsewhere") / "last-checkpoint"
    verify_seal(directory)
    assert "optimizer.pt" in contents(directory)
    assert "optimizer.pt" not in files
    second = run(tmp_path / "second", hub_strategy="checkpoint")
    second.train(resume_from_checkpoint=str(directory))
    assert same_weights(weights(second), weights(whole))
    assert folder(hub.files("me/run"), "last-checkpoint") == contents(tmp_path / "second/checkpoint-16")
    assert [message for message, _ in commits(hub)] == [f"Training in progress, step {step}" for step in (8, 16)]


def test_all_checkpoints(hub, waits, tmp_path):
    run(tmp_path / "run", hub_strategy="all_checkpoints", save_only_model=True).train()
    files = hub.files("me/run")
    for step in (8, 16):
        assert folder(files, f"checkpoint-{step}") == contents(tmp_path / f"run/checkpoint-{step}")
        assert SEAL_NAME in folder(files, f"checkpoint-{step}")
    assert files["masks.safetensors"] == files["checkpoint-16/masks.safetensors"]
    assert files["masks.safetensors"] != files["checkpoint-8/masks.safetensors"]


def test_end(hub, waits, tmp_path):
    hub.create("me/run", {"model-00001-of-00003.safetensors": b"of an earlier run"})
    trained = run(tmp_path / "run", hub_strategy="end", eval_strategy="steps", eval_steps=16)
    trained.recipe = {"dataset": "allenai/c4", "tokens per sequence": 16}
    trained.train()
    assert commits(hub) == []
    (tmp_path / "run/runs/one").mkdir(parents=True)
    (tmp_path / "run/runs/one/events.out.tfevents.1").write_bytes(b"curves")
    (tmp_path / "run/zero_shot.json").write_text("[]")  # of an earlier model
    commit = trained.push_to_hub(license="mit", tags="mine")
    assert str(commit).startswith(f"{hub.url}/me/run/commit/")
    files = hub.files("me/run")
    assert files.keys() == MODEL | {".gitattributes", "runs/one/events.out.tfevents.1"}
    model = load_sparse(pulled(files, tmp_path / "pulled"))
    assert same_weights(weights(trained), dict(model.state_dict()))
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.datasets == ["allenai/c4"]
    assert {"hf_chts", "sparse", "mine"} <= set(card.data.tags)
    assert "| tokens per sequence | 16 |" in card.text
    # by saving it oneself; and without waiting
    with torch.no_grad():
        trained.model.lm_head.weight.zero_()
    trained.save_model()
    assert [message for message, _ in commits(hub)] == ["End of training", "Model save"]
    assert trained.push_to_hub(commit_message="later", blocking=False, revision="side").result(60)
    assert hub.messages("me/run", "side") == ["later"]


def test_a_checkpoint_by_hand(hub, waits, tmp_path):
    trained = run(tmp_path / "run", push_to_hub=False, eval_strategy="steps", eval_steps=8)
    trained.train()
    checkpoint = tmp_path / "run/checkpoint-8"
    before = contents(checkpoint)
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"} < before.keys()
    push_directory(checkpoint, "me/checkpoint")
    files = hub.files("me/checkpoint")
    assert files.keys() == MODEL | {".gitattributes"}
    assert contents(checkpoint) == before
    assert {name: files[name] for name in MODEL - {"README.md"}} == {n: before[n] for n in MODEL - {"README.md"}}
    card = ModelCard(files["README.md"].decode())
    assert "| optimizer steps | 8 of 16 |" in card.text
    assert [result.metric_type for result in card.data.eval_results] == ["loss"]
    assert SparsityHandle.of(load_sparse(pulled(files, tmp_path / "pulled"))).config == trained.sparse.config
    optimizer = checkpoint / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    with pytest.raises(ValueError, match="optimizer.pt has .* bytes, and had"):
        push_directory(checkpoint, "me/checkpoint")


def test_dense(hub, waits, tmp_path):
    run(tmp_path / "run", case="dense", hub_strategy="every_save", save_steps=16).train()
    files = hub.files("me/run")
    assert files.keys() == (MODEL - {"masks.safetensors"}) | {".gitattributes"}
    assert "dense-baseline" in ModelCard(files["README.md"].decode()).data.tags
    assert b'"method": "dense"' in files["sparsity_config.json"]


def test_a_hub_that_fails_does_not_stop_training(hub, waits, tmp_path, caplog):
    hub.create("me/run", {"notes.txt": b"mine"})
    hub.fail("PUT /lfs/", status=None)
    with caplog.at_level(logging.ERROR):
        trained = run(tmp_path / "run", hub_strategy="checkpoint")
        trained.train()
    assert trained.state.global_step == 16
    assert hub.files("me/run").keys() == {".gitattributes", "notes.txt"}
    for step in (8, 16):
        verify_seal(tmp_path / f"run/checkpoint-{step}")
        assert f"checkpoint-{step} was not pushed to me/run: the connection" in caplog.text
    last = tmp_path / "run/checkpoint-16"
    said = f"the last checkpoint is NOT on the Hub: {last} is whole here, and push_to_hub() or `hf-chts push"
    assert said in caplog.messages[-1]
    assert not list((tmp_path / "run").glob(".hub_push*"))
    with pytest.raises(PushFailed, match="was not pushed to me/run: the connection"):
        trained.push_to_hub()
    hub.failures.clear()
    trained.push_to_hub()
    assert hub.files("me/run").keys() == MODEL | {".gitattributes", "notes.txt"}


def test_a_hub_that_is_back_at_the_end(hub, waits, tmp_path, caplog):
    hub.fail("POST .*/preupload/", status=500, on=set(range(1, 13)))  # six tries for each of two checkpoints
    with caplog.at_level(logging.ERROR):
        run(tmp_path / "run", hub_strategy="every_save").train()
    assert [message for message, _ in commits(hub)] == ["Training in progress, step 16"]
    assert [record.getMessage().split(" was")[0] for record in caplog.records] == [
        str(tmp_path / f"run/checkpoint-{step}") for step in (8, 16)
    ]


def test_a_slow_hub(hub, waits, tmp_path):
    hub.open.clear()

    class Open(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            assert not (tmp_path / "run/checkpoint-8").exists()  # it is still being sent
            hub.open.set()

    run(tmp_path / "run", save_total_limit=1, hub_always_push=False, save_steps=4, callbacks=[Open()]).train()
    # 8 and 12 are skipped, as in the Trainer; the last one is not
    assert [message for message, _ in commits(hub)] == [f"Training in progress, step {step}" for step in (4, 16)]
    for number, (_, files) in enumerate(commits(hub)):
        load_sparse(pulled(files, tmp_path / f"pulled-{number}"))
    assert not list((tmp_path / "run").glob(".hub_push*"))


def test_what_is_refused_before_training(hub, waits, tmp_path, monkeypatch):
    with pytest.raises(PushFailed, match="me/run cannot be pushed to: .* refuses the token .401."):
        run(tmp_path / "a", hub_token="hf_wrong")
    with pytest.raises(PushFailed, match="may not write to strangers/run"):
        run(tmp_path / "a", hub_model_id="strangers/run")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PushFailed, match="there is no token"):
        run(tmp_path / "a")
    assert hub.repositories == {}


def test_weights_in_parts_are_refused(hub, waits, tmp_path):
    trained = run(tmp_path / "run", push_to_hub=False)
    in_parts = SimpleNamespace(state_dict_type="StateDictType.SHARDED_STATE_DICT")
    trained.is_fsdp_enabled = True
    trained.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=in_parts))
    with pytest.raises(ValueError, match="fsdp_state_dict_type is .*SHARDED_STATE_DICT.*set it to FULL_STATE_DICT"):
        trained.init_hf_repo()
    assert hub.repositories == {}


def test_leftovers_of_a_run_that_was_killed(hub, waits, tmp_path):
    left = tmp_path / "run/.hub_push.abc"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"x")
    run(tmp_path / "run")
    assert not left.exists()


def test_a_model_without_a_repository_yet(hub, waits, tmp_path):
    trained = run(tmp_path / "name-of-run", push_to_hub=False, hub_model_id=None)
    trained.push_to_hub(private=True)
    assert hub.repositories["me/name-of-run"].private
    assert hub.files("me/name-of-run").keys() == MODEL | {".gitattributes"}

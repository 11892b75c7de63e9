"""Checkpoints: whole or refused, whatever was done to them; and what a run that dies leaves behind."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from cases import arguments, case_config, losses, same_weights, trainer, weights
from tiny import random_blocks, tiny_llama
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_chts import SparseTrainer, export_sparse, load_sparse
from hf_chts.checkpoint import load_masks
from hf_chts.checkpoint.run_folder import last_sealed
from hf_chts.checkpoint.seal import SEAL_NAME, seal, verify_seal

FILES = [
    "masks.safetensors", "topology_history.json", "sparsity_config.json", "model.safetensors", "optimizer.pt",
    "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json", "checkpoint_seal.json",
]  # fmt: skip


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-min(100, len(data) // 2)] ^= 4
    path.write_bytes(bytes(data))


def remove(path):
    path.unlink()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    trainer(directory, max_steps=16, save_steps=8).train()
    return directory / "checkpoint-8"


def refused(run, directory, message, error=(ValueError, FileNotFoundError)):
    before = weights(run)
    masks = {name: mask.clone() for name, mask in run.sparse.masks().items()}
    with pytest.raises(error, match=message):
        run.train(resume_from_checkpoint=str(directory))
    assert same_weights(before, weights(run))
    assert all(mask.equal(masks[name]) for name, mask in run.sparse.masks().items())


def test_the_table_has_every_file(checkpoint):
    assert {path.name for path in checkpoint.iterdir()} == {*FILES, "generation_config.json", "training_args.bin"}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, flip) for name in FILES),
        *((name, how) for name in ("optimizer.pt", SEAL_NAME) for how in (truncate, remove)),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, checkpoint, name, damage):
    copy_of = shutil.copytree(checkpoint, tmp_path / "checkpoint-8")
    damage(copy_of / name)
    # what a seal says of the others may be what was damaged in it
    refused(trainer(tmp_path / "run"), copy_of, "checkpoint-8/" + ("" if name == SEAL_NAME else name))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("masks.safetensors", remove, "masks.safetensors is missing"),
        ("masks.safetensors", truncate, "masks.safetensors cannot be used"),
        ("masks.safetensors", flip, "masks.safetensors cannot be used: its contents do not match the digest"),
        ("topology_history.json", remove, "topology_history.json is missing"),
        ("topology_history.json", truncate, "topology_history.json cannot be used"),
        ("topology_history.json", lambda p: p.write_text('{"step": 3, "history": []}'), "of step 3, .* of step 8"),
        ("sparsity_config.json", remove, "no sparsity config at"),
        ("sparsity_config.json", truncate, "sparsity_config.json"),
    ],
)
def test_damage_that_was_sealed_is_still_refused(tmp_path, checkpoint, name, damage, message):
    copy_of = shutil.copytree(checkpoint, tmp_path / "checkpoint-8")
    damage(copy_of / name)
    seal(copy_of, 8)
    refused(trainer(tmp_path / "run"), copy_of, message)


@pytest.mark.parametrize(
    "contents",
    ['{"format": "other", "files": {}}', '{"format": "hf_chts checkpoint, 1", "files": {"../x": [0, 0]}}', "[]", "{}"],
)
def test_a_foreign_seal_is_refused(tmp_path, checkpoint, contents):
    copy_of = shutil.copytree(checkpoint, tmp_path / "checkpoint-8")
    (copy_of / SEAL_NAME).write_text(contents)
    refused(trainer(tmp_path / "run"), copy_of, f"{SEAL_NAME} cannot be used")


def test_masks_of_another_model_are_refused(tmp_path, checkpoint):
    run = trainer(tmp_path, model=tiny_llama(intermediate_size=80))
    refused(run, checkpoint, r"another model or config: model.layers.0.mlp.down_proj is \(40, 60\) there")


def test_another_config_is_refused(tmp_path, checkpoint):
    refused(trainer(tmp_path, "chts"), checkpoint, "method: 'chtss' there, 'chts' here")
    refused(trainer(tmp_path, "dense"), checkpoint, "checkpoint of a sparse model, this run is dense")


def test_weights_of_another_topology_are_refused(tmp_path, checkpoint):
    copy_of = shutil.copytree(checkpoint, tmp_path / "checkpoint-8")
    trainer(tmp_path / "other").model.save_pretrained(copy_of)
    seal(copy_of, 8)
    with pytest.raises(RuntimeError, match="is not 0 off its mask: .*weight"):
        trainer(tmp_path / "run").train(resume_from_checkpoint=str(copy_of))


def test_checkpoints_of_an_older_version_have_no_loss_before_an_update(tmp_path, checkpoint):
    older = shutil.copytree(checkpoint, tmp_path / "checkpoint-8")
    contents = json.loads((older / "topology_history.json").read_text())
    assert contents.pop("loss_before_update") > 0
    (older / "topology_history.json").write_text(json.dumps(contents))
    seal(older, 8)
    runs = {}
    for name, directory in (("now", checkpoint), ("older", older)):
        runs[name] = trainer(tmp_path / name, model=tiny_llama(seed=5), max_steps=16, save_strategy="no")
        runs[name].train(resume_from_checkpoint=str(directory))
    assert losses(runs["older"]) == losses(runs["now"])
    told = {n: [e["step"] for e in run.state.log_history if "loss_after_update" in e] for n, run in runs.items()}
    assert told == {"now": [5, 9], "older": [5]}


def test_the_console_of_a_resumed_run_goes_on_with_the_update_that_the_checkpoint_ends_with(tmp_path, capsys):
    def lines():
        # of two columns and more, without the seconds at their ends
        return [x.rpartition("  ")[0] for x in capsys.readouterr().out.splitlines() if x[:6].strip().isdigit()]

    trainer(tmp_path, max_steps=16, save_steps=8).train()
    whole = lines()
    trainer(tmp_path / "run", model=tiny_llama(seed=5), max_steps=16).train(str(tmp_path / "checkpoint-8"))
    update = next(x for x in whole if x.startswith("     8") and "sparse" in x)
    assert "loss" in update
    assert lines()[:-1] == whole[whole.index(update) : -1]  # the last is of the whole session


@pytest.mark.parametrize("case", ["chtss", "dense"])
def test_a_checkpoint_of_a_plain_trainer_is_called_one(tmp_path, case):
    plain = arguments(tmp_path / "plain", TrainingArguments, max_steps=2, save_steps=2)
    Trainer(tiny_llama(), plain, train_dataset=random_blocks()).train()
    for resume in (str(tmp_path / "plain/checkpoint-2"), True):
        run = trainer(tmp_path / "plain", case)
        before = weights(run)
        with pytest.raises(
            (FileNotFoundError, ValueError), match="checkpoint of a plain Trainer.*without masks and seal"
        ) as error:
            run.train(resume_from_checkpoint=resume)
        assert "checkpoint-2" in str(error.value)
        assert "not written whole" not in str(error.value)
        assert same_weights(before, weights(run))


def test_an_export_is_no_checkpoint(tmp_path):
    run = trainer(tmp_path / "run", save_strategy="no")
    exported = export_sparse(run.model, tmp_path / "export")
    refused(run, exported, "is not a training checkpoint: it has masks.* load_sparse")


def test_resume_true_passes_over_what_is_not_whole(tmp_path):
    run_dir = tmp_path / "run"
    whole = trainer(run_dir, max_steps=16, save_steps=8)
    whole.train()
    remove(run_dir / "checkpoint-16" / SEAL_NAME)
    again = trainer(run_dir, model=tiny_llama(seed=5), max_steps=16, save_steps=8)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole)
    remove(run_dir / "checkpoint-8" / SEAL_NAME)
    remove(run_dir / "checkpoint-16" / SEAL_NAME)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        trainer(run_dir).train(resume_from_checkpoint=True)


def test_a_best_checkpoint_that_was_damaged_meanwhile_is_refused(tmp_path):
    class Damage(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps:
                # nothing but the seal tells: the optimizer is not read again at the end
                flip(Path(state.best_model_checkpoint) / "optimizer.pt")

    run = trainer(
        tmp_path, save_steps=4, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True,
        save_total_limit=None,
    )  # fmt: skip
    run.add_callback(Damage())
    with pytest.raises(ValueError, match="optimizer.pt"):
        run.train()


def test_a_limit_keeps_the_last_and_the_best(tmp_path):
    run = trainer(
        tmp_path, save_steps=4, save_total_limit=2, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True,
        metric_for_best_model="loss",
    )  # fmt: skip
    run.train()
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert len(kept) == 2
    assert {Path(run.state.best_model_checkpoint).name, "checkpoint-24"} <= kept
    assert all((tmp_path / name / SEAL_NAME).is_file() for name in kept)


def test_save_model_alone_writes_masks_beside_the_weights(tmp_path):
    run = trainer(tmp_path / "run", save_strategy="no")
    run.save_model(str(tmp_path / "model"))
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"masks.safetensors", "topology_history.json", "sparsity_config.json", "model.safetensors"} <= names


@pytest.mark.parametrize("case", ["chtss", "dense"])
def test_a_checkpoint_without_optimizer_state_is_refused_with_what_that_means(tmp_path, case):
    trainer(tmp_path / "run", case, save_only_model=True, max_steps=16, save_steps=8).train()
    for resume in (True, str(tmp_path / "run/checkpoint-8")):
        run = trainer(tmp_path / "run", case, model=tiny_llama(seed=5), max_steps=16)
        before = weights(run)
        with pytest.raises(ValueError, match="no state of the optimizer and the schedule, .*save_only_model") as error:
            run.train(resume_from_checkpoint=resume)
        assert "load_sparse" in str(error.value)
        assert same_weights(before, weights(run))
    # the remedy that is named
    if case != "dense":
        masks = load_masks(tmp_path / "run/checkpoint-8").masks
        model = load_sparse(tmp_path / "run/checkpoint-8")
        new = trainer(tmp_path / "new", model=model, max_steps=16)
        assert all(mask.equal(masks[name]) for name, mask in new.sparse.masks().items())
        new.train()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_that_lacks_one_of_them_is_refused_by_it(tmp_path, checkpoint, name):
    copy_of = shutil.copytree(checkpoint, tmp_path / "checkpoint-8")
    remove(copy_of / name)
    seal(copy_of, 8)
    refused(trainer(tmp_path / "run"), copy_of, f"no state of the {'schedule' if 'sch' in name else 'optimizer'}, as")


def test_a_trainer_that_makes_its_model_anew_resumes_bit_for_bit(tmp_path):
    def made(factor):
        def model_init():  # of the same seed, which orders the data too, and with other weights
            model = tiny_llama()
            for weight in model.parameters():
                weight.data.mul_(factor)
            return model

        return SparseTrainer(
            model_init=model_init, args=arguments(tmp_path), sparsity=case_config(), train_dataset=random_blocks()
        )

    whole = made(1)
    whole.train()
    again = made(2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert losses(again) == losses(whole)
    assert same_weights(weights(again), weights(whole))
    assert [entry["step"] for entry in again.evolver.history] == [4, 8, 12, 16]


def test_damaged_checkpoints_are_passed_over_where_that_is_asked_for(tmp_path, caplog):
    whole = trainer(tmp_path, save_steps=6)
    whole.train()
    flip(tmp_path / "checkpoint-24/optimizer.pt")
    remove(tmp_path / "checkpoint-18/model.safetensors")
    damaged = (tmp_path / "checkpoint-24/optimizer.pt").read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint-24/optimizer.pt is damaged.*skip_damaged_checkpoints"):
        trainer(tmp_path, save_steps=6).train(resume_from_checkpoint=True)
    named = trainer(tmp_path, save_steps=6, skip_damaged_checkpoints=True)
    with pytest.raises(ValueError, match="checkpoint-24/optimizer.pt is damaged"):  # what is named is not replaced
        named.train(resume_from_checkpoint=str(tmp_path / "checkpoint-24"))
    assert (tmp_path / "checkpoint-24/optimizer.pt").read_bytes() == damaged
    again = trainer(tmp_path, model=tiny_llama(seed=5), save_steps=6, skip_damaged_checkpoints=True)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole)
    assert same_weights(weights(again), weights(whole))
    for step in (18, 24):
        assert f"checkpoint-{step} is damaged: it is {tmp_path}/damaged-checkpoint-{step} now" in caplog.text
        verify_seal(tmp_path / f"checkpoint-{step}")
    assert (tmp_path / "damaged-checkpoint-24/optimizer.pt").read_bytes() == damaged  # nothing is deleted
    # where none is whole, nothing begins anew without being told
    for path in tmp_path.glob("checkpoint-*"):
        flip(path / "model.safetensors")
    with pytest.raises(ValueError, match="all checkpoints in .* are damaged: .*checkpoint-24.*checkpoint-6/"):
        trainer(tmp_path, skip_damaged_checkpoints=True).train(resume_from_checkpoint=True)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 4


class Terminated(TrainerCallback):
    """As SIGTERM under enable_jit_checkpoint, whose handler waits for seconds before it asks for a checkpoint."""

    def __init__(self, step, event):
        self.step, self.event = step, event

    def ask(self, event, state):
        if event == self.event and state.global_step == self.step:
            for callback in self.run.callback_handler.callbacks:
                if isinstance(callback, JITCheckpointCallback):
                    callback.jit_manager.is_checkpoint_requested = True

    def on_step_end(self, args, state, control, **kwargs):
        self.ask("in a step", state)

    def on_save(self, args, state, control, **kwargs):
        self.ask("after a save", state)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped."""
    run = trainer(tmp_path_factory.mktemp("whole"), save_strategy="no")
    run.train()
    return run


@pytest.mark.parametrize(("step", "event"), [(8, "in a step"), (10, "after a save"), (11, "in a step")])
def test_a_checkpoint_at_sigterm_is_whole_and_has_the_update_of_its_step(tmp_path, monkeypatch, whole, step, event):
    handler = signal.getsignal(signal.SIGTERM)
    sealed, rmtree = [], shutil.rmtree

    def remembered(path, *args, **kwargs):
        sealed.append((Path(path) / SEAL_NAME).exists())
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", remembered)
    run = trainer(tmp_path / "run", enable_jit_checkpoint=True)
    try:
        asked = Terminated(step, event)
        asked.run = run
        run.callback_handler.callbacks.insert(0, asked)
        run.train()
        assert run.state.global_step <= step + 1
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert not any(sealed)  # no whole checkpoint goes to be written once more
    assert last_sealed(tmp_path / "run") == str(tmp_path / f"run/checkpoint-{step}")
    verify_seal(tmp_path / f"run/checkpoint-{step}")
    again = trainer(tmp_path / "run", model=tiny_llama(seed=5))
    again.train(resume_from_checkpoint=True)
    # the Trainer logs a step after it has been saved like that, so that its loss is not in the log
    expected = losses(whole)
    assert losses(again) == (expected if event == "after a save" else expected[: step - 1] + expected[step:])
    histories = [
        [{k: v for k, v in line.items() if "seconds" not in k} for line in run.evolver.history]
        for run in (again, whole)
    ]
    assert histories[0] == histories[1]
    assert same_weights(weights(again), weights(whole))


def test_what_the_trainer_removes_after_a_save_is_not_sealed(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "checkpoint-is-incomplete.txt").write_text("in progress")  # by another rank, at SIGTERM
    seal(tmp_path, 3)
    (tmp_path / "checkpoint-is-incomplete.txt").unlink()
    verify_seal(tmp_path)


def test_a_finished_run_that_is_resumed_trains_no_step_more(tmp_path):
    # killed between its last save and its end, for example
    first = trainer(tmp_path)
    first.train()
    again = trainer(tmp_path, model=tiny_llama(seed=5))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == first.state.global_step
    assert same_weights(weights(again), weights(first))

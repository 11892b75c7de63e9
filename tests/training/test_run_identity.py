"""Runs and their folders: none resumes from another's checkpoints, mixes records with it, or writes there at once."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from cases import Stop, all_of, arguments, case_config, differences, losses, same_weights, trainer, weights
from filelock import FileLock
from tiny import random_blocks, tiny_llama
from transformers import TrainerCallback, integrations

from hf_chts import SparseTrainer
from hf_chts.checkpoint.run_folder import OutputLock, last_sealed
from hf_chts.checkpoint.seal import SEAL_NAME, seal, sealed_run, verify_seal
from hf_chts.records.run_record import read_lines
from hf_chts.report.run import read_run
from hf_chts.sharding import ranks as ranks_module
from hf_chts.sharding.ranks import together


class At(TrainerCallback):
    """Calls `do` before a step."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.do()


def first_step(run):
    """A list that gets the step from which each training of `run` starts."""
    begun = []
    run.add_callback(Begun(begun))
    return begun


class Begun(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


def checkpoints(directory):
    return {path.name for path in Path(directory).glob("checkpoint-*")}


def ids(directory):
    """The ids in all places that have one: seals, topology states, records, the folder."""
    found = {json.loads((directory / "run_identity.json").read_text())["run"]["id"]}
    found.add(read_lines(directory / "topology/layers.jsonl")[0]["run"])
    for checkpoint in directory.glob("checkpoint-*"):
        found.add(sealed_run(checkpoint)["id"])
        found.add(json.loads((checkpoint / "topology_history.json").read_text())["run"])
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of 24 steps, to copy."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    trainer(directory).train()
    return directory


def test_an_identity_is_unique_and_kept_on_resume(tmp_path):
    for name in "ab":
        trainer(tmp_path / name, callbacks=[Stop(12)]).train()
    again = trainer(tmp_path / "a", model=tiny_llama(seed=5))
    again.train(resume_from_checkpoint=True)
    (first,), (second,) = ids(tmp_path / "a"), ids(tmp_path / "b")
    assert checkpoints(tmp_path / "a") == {"checkpoint-10", "checkpoint-20", "checkpoint-24"}
    assert first != second
    # resumed in another folder, it is the same run
    trainer(tmp_path / "c", save_steps=5).train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-20"))
    assert ids(tmp_path / "c") == {first}


@pytest.mark.parametrize(("case", "save"), [("chtss", "no"), ("dense", "steps"), ("dense", "no")])
def test_a_new_run_in_the_folder_of_another_is_refused_and_changes_nothing(tmp_path, case, save):
    first = trainer(tmp_path, case)
    first.train()
    before = files(tmp_path)
    other = trainer(tmp_path, case, model=tiny_llama(seed=5), seed=7, save_strategy=save)
    untrained = weights(other)
    if case == "dense" and save == "no":  # nothing of it goes there
        other.train()
        assert files(tmp_path) == before
        return
    with pytest.raises(ValueError, match=r"another run \(run \w+, begun \S+, seed 42\), up to checkpoint-24") as error:
        other.train()
    for remedy in ("resume_from_checkpoint true", "another output_dir", "overwrite_output_dir true"):
        assert remedy in str(error.value)
    assert files(tmp_path) == before
    assert same_weights(weights(other), untrained)
    with pytest.raises(ValueError, match="another run .*seed: 42 there, 7 here"):
        other.train(resume_from_checkpoint=True)
    assert files(tmp_path) == before


def test_a_run_that_overwrites_another_never_resumes_from_it(tmp_path, trained):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)

    def again(step=99):
        callbacks = [Stop(step)]
        return trainer(tmp_path, "set", callbacks, tiny_llama(seed=3), seed=7, overwrite_output_dir=True)

    again(step=6).train()  # before its first checkpoint
    with pytest.raises(ValueError, match="no whole checkpoint of this run .*up to .*checkpoint-24 were passed over"):
        again().train(resume_from_checkpoint=True)
    again(step=12).train()  # the same folder once more: nothing of the run before has been saved
    assert last_sealed(tmp_path) == str(tmp_path / "checkpoint-10")
    assert checkpoints(tmp_path) == {"checkpoint-10", "checkpoint-20", "checkpoint-24"}  # nothing is deleted
    read = read_run(tmp_path)
    assert (read.config.method, len([entry for entry in read.log if "loss" in entry])) == ("set", 10)
    resumed = again()
    begun = first_step(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert begun == [10]
    whole = trainer(tmp_path / "whole", "set", model=tiny_llama(seed=3), seed=7)
    whole.train()
    assert differences(all_of(resumed), all_of(whole)) == []
    assert len(ids(tmp_path)) == 1


def test_a_trainer_that_trains_again_is_not_resumed_from_its_first_training(tmp_path):
    run = trainer(tmp_path)
    run.train()
    run.add_callback(Stop(12))
    run.train()
    later = trainer(tmp_path, model=tiny_llama(seed=5))
    begun = first_step(later)
    later.train(resume_from_checkpoint=True)
    assert begun == [10]


def test_a_run_that_went_back_is_resumed_from_where_it_went_back_to(tmp_path, caplog, trained):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    lower = trainer(tmp_path, callbacks=[Stop(12)], learning_rate=1e-3)
    lower.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert "passes over checkpoint-20, checkpoint-24" in caplog.text
    for wanted in (10, 20):  # what was passed over, and what has been written anew since then
        again = trainer(tmp_path, learning_rate=1e-3)
        begun = first_step(again)
        again.add_callback(Stop(22))
        again.train(resume_from_checkpoint=True)
        assert begun == [wanted]
    # by its name, any can be had
    named = trainer(tmp_path)
    begun = first_step(named)
    named.train(resume_from_checkpoint=str(tmp_path / "checkpoint-24"))
    assert begun == [24]


def test_a_run_resumes_only_with_the_same_made_of(tmp_path):
    def run(made_of=None, **changes):
        made = trainer(tmp_path, **changes)
        if made_of is not None:
            made.made_of = made_of
        return made

    run({"data": "fables", "shape": (3, 4)}).train()
    before = files(tmp_path)
    with pytest.raises(ValueError, match="data: 'fables' there, 'news' here") as error:
        run({"data": "news", "shape": (3, 4), "new": 1}).train(resume_from_checkpoint=True)
    assert "shape" not in str(error.value)
    with pytest.raises(ValueError, match="data_seed: None there, 3 here"):
        run(data_seed=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert files(tmp_path) == before
    run({"data": "fables", "shape": (3, 4)}).train(resume_from_checkpoint=True)
    run().train(resume_from_checkpoint=True)  # nothing is said
    run(seed=3, ignore_data_skip=True).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def test_checkpoints_without_identities_resume_and_are_protected_from_new_runs(tmp_path):
    whole = trainer(tmp_path)
    whole.train()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        path = checkpoint / "topology_history.json"
        history = json.loads(path.read_text())
        del history["run"]
        path.write_text(json.dumps(history))
        seal(checkpoint, int(checkpoint.name.split("-")[1]))
        older = json.loads((checkpoint / SEAL_NAME).read_text())
        del older["checksum"]
        (checkpoint / SEAL_NAME).write_text(json.dumps(older))
    (tmp_path / "run_identity.json").unlink()
    records = (tmp_path / "topology/layers.jsonl").read_text().splitlines()
    header = json.loads(records[0])
    del header["run"]
    (tmp_path / "topology/layers.jsonl").write_text("\n".join([json.dumps(header), *records[1:], ""]))
    with pytest.raises(ValueError, match="another run, up to checkpoint-24"):
        trainer(tmp_path).train()
    again = trainer(tmp_path, model=tiny_llama(seed=5), callbacks=[Stop(22)])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    again = trainer(tmp_path, model=tiny_llama(seed=6))
    begun = first_step(again)
    again.train(resume_from_checkpoint=True)  # beside checkpoint-10, which has no identity
    assert begun == [20]
    assert differences(all_of(again), all_of(whole)) == []
    # the records went on, and have the run's id now
    lines = read_lines(tmp_path / "topology/layers.jsonl")
    assert [line["step"] for line in lines[1:]] == [4, 8, 12, 16]
    assert lines[0]["run"] == sealed_run(tmp_path / "checkpoint-24")["id"]


def test_files_of_two_runs_in_one_checkpoint_are_refused(tmp_path):
    for name in "ab":
        trainer(tmp_path / name, max_steps=16).train()
    history = (tmp_path / "b/checkpoint-10/topology_history.json").read_bytes()
    mixed = tmp_path / "a/checkpoint-10"
    (mixed / "topology_history.json").write_bytes(history)
    seal(mixed, 10, sealed_run(mixed))
    with pytest.raises(ValueError, match="checkpoints of two runs"):
        trainer(tmp_path / "a").train(resume_from_checkpoint=str(mixed))


def test_damage_is_found_at_every_byte_of_a_seal(tmp_path):
    (tmp_path / "file").write_bytes(b"contents")
    seal(tmp_path, 3, {"id": "x", "seed": 42})
    path = tmp_path / SEAL_NAME
    whole = path.read_bytes()
    verify_seal(tmp_path)
    begin = whole.index(b'"checksum"')
    for position in range(begin):  # a seal without its checksum would be one of an early version
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        if json.loads(whole) == _read(path):
            continue  # a space has changed
        with pytest.raises((ValueError, FileNotFoundError)):
            verify_seal(tmp_path)


def _read(path):
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def test_a_finished_run_says_that_nothing_is_left(tmp_path, caplog, trained):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    trainer(tmp_path, model=tiny_llama(seed=5), max_steps=15).train(resume_from_checkpoint=True)
    assert "of step 24, and this run has 15 steps: nothing was left to train" in caplog.text


@pytest.mark.parametrize("case", ["static", "dense"])
def test_a_run_without_updates_says_that_its_length_has_changed(tmp_path, case, caplog):
    trainer(tmp_path, case, max_steps=10).train()
    trainer(tmp_path, case, model=tiny_llama(seed=5)).train(resume_from_checkpoint=True)
    assert "The run goes on to step 24, that of the checkpoint would have gone to 10" in caplog.text


def test_two_runs_at_once_in_one_folder(tmp_path):
    refused = []

    def second():
        other = trainer(tmp_path, model=tiny_llama(seed=5))
        before = files(tmp_path)
        for resume in (None, True):
            with pytest.raises(ValueError, match=f"another run is training in {tmp_path} .*another output_dir"):
                other.train(resume_from_checkpoint=resume)
        assert files(tmp_path) == before
        refused.append(True)
        trainer(tmp_path / "elsewhere", model=tiny_llama(seed=5), max_steps=16).train()

    run = trainer(tmp_path, callbacks=[At(12, second)])
    run.train()
    assert refused == [True]
    whole = trainer(tmp_path / "whole")
    whole.train()
    assert losses(run) == losses(whole)
    trainer(tmp_path, max_steps=26).train(resume_from_checkpoint=True)  # the lock has gone


def test_the_lock_is_free_after_an_error_and_an_interrupt(tmp_path):
    def fail(error):
        raise error

    for error in (ArithmeticError, KeyboardInterrupt):
        with pytest.raises(error):
            trainer(tmp_path, callbacks=[At(3, lambda error=error: fail(error))]).train()
        OutputLock().take(tmp_path)


def test_the_lock_ends_with_its_process_even_if_a_child_lives_on(tmp_path):
    reading, writing = os.pipe()
    holder = os.fork()
    if not holder:
        lock = OutputLock()
        lock.take(tmp_path)
        child = os.fork()  # as a worker of the data loader
        os.write(writing, str(child or os.getpid()).encode().rjust(12)) if child else None
        signal.pause()
        os._exit(0)
    child = int(os.read(reading, 12))
    try:
        with pytest.raises(ValueError, match="another run is training"):
            OutputLock().take(tmp_path)
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        lock = OutputLock()
        lock.take(tmp_path)
        lock.release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_that_cannot_be_locked_gives_a_warning_and_the_run_trains(tmp_path, monkeypatch, caplog):
    def none(self, *args, **kwargs):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(FileLock, "acquire", none)
    run = trainer(tmp_path, max_steps=16)
    run.train()
    assert run.state.global_step == 16
    assert f"{tmp_path} cannot be locked" in caplog.text


def test_trials_of_a_search_have_a_folder_and_an_identity_each(tmp_path, monkeypatch):
    run = SparseTrainer(
        model_init=lambda: tiny_llama(), args=arguments(tmp_path, max_steps=16, save_steps=8),
        sparsity=case_config(), train_dataset=random_blocks(),
    )  # fmt: skip
    # as hyperparameter_search has it, without a package that proposes trials
    run.hp_search_backend, run.hp_name, run.model_init = "optuna", None, lambda trial: tiny_llama()
    run._hp_search_setup = lambda trial: None
    monkeypatch.setattr(integrations, "hp_params", dict)
    for number in (0, 1):
        trial = Trial()
        trial.number = number
        run.train(trial=trial)
    first, second = (ids(tmp_path / f"run-{number}") for number in (0, 1))
    assert len(first) == len(second) == 1
    assert first != second
    assert not (tmp_path / "topology").exists()


class Trial(dict):
    """The hyperparameters of a trial, and its number."""


def ranks(monkeypatch, *others):
    """Play rank 0, with these answers of the other ranks."""

    def gather(everyone, mine):
        everyone[:] = [mine, *others]

    monkeypatch.setattr(ranks_module, "rank_and_world", lambda: (0, 1 + len(others)))
    monkeypatch.setattr(ranks_module.dist, "all_gather_object", gather)


def test_ranks_that_differ_are_named_with_what_differs(monkeypatch):
    mine = {"max_steps": "24", "sparsity's topology_seed": "0", "optim": "adamw"}
    ranks(monkeypatch, (mine, None, None), ({**mine, "sparsity's topology_seed": "3"}, None, None))
    with pytest.raises(ValueError, match="sparsity's topology_seed is 0 on rank 0, 3 on rank 2") as error:
        together(mine, word="run")
    assert "rank 1" not in str(error.value)
    assert "optim" not in str(error.value)
    ranks(monkeypatch, (mine, None, "other"))
    assert together(mine, word="run") == "run"


def test_an_error_of_one_rank_is_raised_on_all(monkeypatch):
    ranks(monkeypatch, ({}, "there is no checkpoint", None))
    with pytest.raises(ValueError, match="rank 1 of 2 cannot train, so rank 0 does not: there is no checkpoint"):
        together({"max_steps": "24"})
    with pytest.raises(FileNotFoundError, match="mine"):  # its own comes first
        together(None, FileNotFoundError("mine"))

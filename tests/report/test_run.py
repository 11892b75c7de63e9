"""What is read of a run's directory, whatever is left of it."""

import shutil

import pytest
from cases import trainer
from short_runs import log_of, trained

from hf_chts.report import write_report
from hf_chts.report.drawings import drawings_of
from hf_chts.report.run import labels, read_run
from hf_chts.report.summary import summary_rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    return {case: trained(directory / case, case) for case in ("set", "dense")}


def lean(directory, source, *parts):
    """A copy of these parts of a run's directory."""
    for part in parts:
        if (source / part).is_dir():
            shutil.copytree(source / part, directory / part)
        else:
            directory.mkdir(exist_ok=True)
            shutil.copy(source / part, directory / part)
    return directory


def read(directory):
    """A run, its line of the summary, the titles of its figures and its notes."""
    run = read_run(directory)
    titles = [drawing.title for drawing in drawings_of(run)]
    return run, {row.name: row.cells[0] for row in summary_rows([run])}, titles, " ".join(run.notes)


def test_a_run_of_which_only_checkpoints_are_left(tmp_path, runs):
    bare = lean(tmp_path / "bare", runs["set"], "checkpoint-12", "checkpoint-24")
    _, table, titles, said = read(bare)
    assert "There is no topology/layers.jsonl" in said
    assert "No evaluation was logged" in said
    assert titles == ["Loss", "Schedules", "Seconds spent on the topology", "Exploration", "Links removed and regrown"]
    assert table["Method"] == "set"
    assert table["Bits per byte"] == "–"
    assert table["Share of the time"] == "–"  # the Trainer's own seconds are of its last start
    assert write_report([bare]).read_text().count("<img") == 5


def test_a_run_that_goes_on(tmp_path, runs):
    # its last checkpoint is of step 12, its records are further
    going = lean(tmp_path / "going", runs["set"], "checkpoint-12", "topology")
    records = going / "topology"
    lines = (records / "layers.jsonl").read_text().splitlines()
    (records / "layers.jsonl").write_text("\n".join(lines) + '\n{"ste')
    seconds = (records / "seconds.jsonl").read_text().splitlines()
    (records / "seconds.jsonl").write_text("\n".join(seconds[:4]) + "\n")
    _, table, _, said = read(going)
    assert "The run is at step 16 of 24: it is still going on, or was stopped." in said
    assert table["Steps"] == "16 of 24"
    assert table["Updates"] == "4"
    last = [entry for entry in log_of(runs["set"]) if "itop" in entry][-1]
    assert table["ITOP"] == f"{last['itop']:.4f}"  # which the checkpoint does not know yet


def test_a_run_without_a_checkpoint_yet(tmp_path, runs):
    run, _, titles, said = read(lean(tmp_path / "young", runs["set"], "topology"))
    assert "There is no checkpoint yet" in said
    assert "Exploration" in titles
    assert "Loss" not in titles
    # the records know what the log would have said
    logged = [entry for entry in log_of(runs["set"]) if "itop" in entry]
    for found, expected in zip(run.updates(), logged, strict=True):
        for key in ("sparsity", "itop", "overlap", "active_neurons", "links_removed", "links_regrown", "step"):
            assert found[key] == pytest.approx(expected[key]), key


def test_what_cannot_be_read_is_said(tmp_path, runs):
    hurt = lean(tmp_path / "hurt", runs["set"], "checkpoint-24", "topology", "trainer_state.json")
    (hurt / "trainer_state.json").write_text('{"log_history": [')
    snapshot = hurt / "topology/snapshot-8.safetensors"
    snapshot.write_bytes(snapshot.read_bytes()[:-3])
    run, table, titles, said = read(hurt)
    assert f"{hurt}/trainer_state.json could not be read" in said
    assert "snapshot-8.safetensors cannot be used" in said
    assert table["Steps"] == "24"  # of the checkpoint
    assert list(run.snapshots) == [0, 16]
    assert "Adjacency" in titles


def test_the_state_that_knows_most_is_taken(tmp_path, runs):
    # a run that was trained further than where it once ended
    run = lean(tmp_path / "longer", runs["set"], "checkpoint-24")
    shutil.copy(runs["set"] / "checkpoint-12/trainer_state.json", run / "trainer_state.json")
    assert read_run(run).log == log_of(runs["set"] / "checkpoint-24")


def test_runs_with_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / name for name in ("a/x/run", "b/x/run", "b/y/run", "b/other")]
    assert labels(paths) == ["a/x/run", "b/x/run", "y/run", "other"]


def test_layers_by_a_pattern(runs):
    run = read_run(runs["set"], layers="*.1.mlp.down_proj")
    alts = " ".join(drawing.alt for drawing in drawings_of(run))
    assert "q_proj" not in alts
    assert "layers.1.mlp.down_proj" in alts
    assert summary_rows([run]) == summary_rows([read_run(runs["set"])])  # which are of all layers


def test_records_of_an_earlier_run_in_the_directory_of_a_dense_one(tmp_path, runs):
    mixed = lean(tmp_path / "mixed", runs["dense"], "trainer_state.json")
    _, table, titles, said = read(lean(mixed, runs["set"], "topology"))
    assert "from an earlier, sparse run" in said
    assert table["Method"] == "dense"
    assert titles == ["Loss and bits per byte"]


def test_updates_that_were_not_recorded_are_counted(tmp_path, runs):
    part = lean(tmp_path / "part", runs["set"], "topology", "trainer_state.json", "checkpoint-24")
    path = part / "topology/layers.jsonl"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *lines[2:]]) + "\n")
    run, _, _, said = read(part)
    assert "2 updates, from step 4 to 8, are not in topology/layers.jsonl" in said
    assert [entry["step"] for entry in run.updates()] == [4, 8, 12, 16]


def test_a_static_run_has_a_start_only(tmp_path):
    trainer(tmp_path / "static", "static", max_steps=4, save_steps=4).train()
    _, table, titles, _ = read(tmp_path / "static")
    assert titles == ["Loss", "Adjacency", "Degrees"]
    assert table["Sparsity"] == "90.00%"


def test_a_difference_that_rounds_to_nothing_has_no_sign(tmp_path, runs):
    first, second = read_run(runs["set"]), read_run(runs["set"])
    second.log[:] = [{**entry, **({"eval_loss": 4.62219} if "eval_loss" in entry else {})} for entry in second.log]
    (row,) = (row for row in summary_rows([first, second]) if row.name == "Validation loss")
    assert (row.cells, row.differences) == (["4.6222", "4.6222"], ["", "0.0000"])

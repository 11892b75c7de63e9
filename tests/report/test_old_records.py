"""Runs recorded by another version: what it did not write is missing, what only it knows is ignored, the rest is there.

`recorded/version_0_1` is what a run of 24 steps left behind, of one block with 7 layers and 3 updates.
"""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from hf_chts.report import write_report
from hf_chts.report.drawings import drawings_of
from hf_chts.report.run import read_run
from hf_chts.report.summary import summary_rows

RECORDED = Path(__file__).parent / "recorded" / "version_0_1"
# by hand: of 4 · 16 · 16 + 3 · 24 · 16 = 2176 possible links 544 are there, 681 were; all of the 248 nodes have one
TABLE = {
    "Method": "chts",
    "Steps": "24",
    "Sparsity": "75.00%",
    "ITOP": f"{681 / 2176:.4f}",
    "Active neurons": "100.00%",
    "Updates": "3",
    "Seconds on topology": "0.0",
    "Share of the time": f"{0.0453 / 0.2246:.1%}",
    "Seconds of training": "0",
}
TITLES = {
    "Loss", "Schedules", "Seconds spent on the topology", "Exploration", "Links removed and regrown",
    "Overlap by layer", "ITOP by layer", "Active neurons by layer", "Adjacency", "Degrees",
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(RECORDED, tmp_path / "run")


def read(directory):
    run = read_run(directory)
    drawn = {drawing.title: drawing for drawing in drawings_of(run)}
    return run, summary(run), drawn, " ".join(run.notes)


def summary(run):
    return {row.name: row.cells[0] for row in summary_rows([run]) if row.name in TABLE}


def change_lines(path, change):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


def change_json(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def without(*keys):
    return lambda values: {key: value for key, value in values.items() if key not in keys}


def with_more(values):
    return values | {"new_figure": [[1]], "newer": "yes"}


def log_without(*keys):
    return lambda state: state | {"log_history": [without(*keys)(entry) for entry in state["log_history"]]}


def change_snapshots(directory, change):
    for path in directory.glob("snapshot-*"):
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata()
        save_file(change(tensors), path, metadata)


def test_all_of_it_is_read(run):
    found, table, drawn, said = read(run)
    assert table == TABLE
    assert set(drawn) == TITLES
    assert "version" not in said
    by_step = {entry["step"]: entry for entry in found.updates()}
    assert list(by_step) == [6, 12, 18]
    assert by_step[6]["overlap"] == pytest.approx(20 / 122)
    assert (by_step[12]["links_removed"], by_step[12]["links_regrown"]) == (41, 41)
    assert write_report([run]).read_text().count("<img") == len(TITLES)


# what each count is needed for: a row of the summary, figures of each layer
NEEDED = {
    "links": ("Sparsity", None),
    "removed": (None, None),
    "regrown": (None, "Overlap by layer"),
    "returned": (None, "Overlap by layer"),
    "active": ("Active neurons", "Active neurons by layer"),
    "explored": ("ITOP", "ITOP by layer"),
}


@pytest.mark.parametrize(
    ("count", "damage"), [*((count, "missing") for count in NEEDED), ("explored", "of another number of layers")]
)
def test_a_count_that_was_not_written(run, count, damage):
    change = without(count) if damage == "missing" else (lambda line: line | ({count: [1]} if count in line else {}))
    change_lines(run / "topology/layers.jsonl", change)
    logged = {"links": "sparsity", "active": "active_neurons", "explored": "itop", "returned": "overlap"}
    change_json(run / "trainer_state.json", log_without(logged.get(count, f"links_{count}"), "overlap"))
    row, title = NEEDED[count]
    _, table, drawn, said = read(run)
    assert table == TABLE | ({row: "–"} if row else {})
    gone = {title, "Links removed and regrown" if count in ("removed", "regrown") else None}
    assert set(drawn) == TITLES - gone
    assert (count in said) == (damage == "missing")
    assert all("nan" not in drawing.alt and "None" not in drawing.alt for drawing in drawn.values())


@pytest.mark.parametrize("figure", ["itop", "links_regrown"])
def test_a_figure_that_was_not_logged_is_that_of_the_records(run, figure):
    change_json(run / "trainer_state.json", log_without(figure))
    _, table, drawn, _ = read(run)
    assert table == TABLE
    assert set(drawn) == TITLES


@pytest.mark.parametrize(
    ("field", "rows", "titles"),
    [
        ("seconds", ("Share of the time", "Seconds of training"), ()),
        ("topology_seconds", ("Share of the time", "Seconds on topology"), ("Seconds spent on the topology",)),
        ("steps", (), ()),
    ],
)
def test_seconds_that_were_not_written(run, field, rows, titles):
    change_lines(run / "topology/seconds.jsonl", without(field))
    change_json(run / "trainer_state.json", log_without("topology_seconds", "train_runtime"))
    _, table, drawn, _ = read(run)
    assert table == TABLE | dict.fromkeys(rows, "–")
    assert set(drawn) == TITLES - set(titles)


@pytest.mark.parametrize("kind", ["picture", "out_degrees", "in_degrees"])
def test_a_snapshot_without_a_kind_of_figure(run, kind):
    change_snapshots(run / "topology", lambda found: {k: v for k, v in found.items() if not k.endswith(kind)})
    _, table, drawn, said = read(run)
    assert table == TABLE
    assert set(drawn) == TITLES - {"Adjacency" if kind == "picture" else "Degrees"}
    assert "cannot be used" not in said
    if kind != "picture":  # the density is that of the picture then, whose cells are single links
        assert drawn["Adjacency"].alt == read(RECORDED)[2]["Adjacency"].alt


def test_any_field_of_the_config_may_not_have_been_there(run):
    whole = json.loads((run / "sparsity_config.json").read_text())
    for name in whole.keys() - {"method", "sparsity"}:
        (run / "sparsity_config.json").write_text(json.dumps(without(name)(whole)))
        found = read_run(run)
        assert summary(found) == TABLE, name
        assert not any("config" in note for note in found.notes), name


@pytest.mark.parametrize("name", ["global_step", "max_steps"])
def test_a_field_of_the_state_that_was_not_there(run, name):
    change_json(run / "trainer_state.json", without(name))
    assert summary(read_run(run)) == TABLE


def test_what_this_version_does_not_know_is_left(run):
    for name in ("layers", "seconds"):
        change_lines(run / f"topology/{name}.jsonl", with_more)
    for name in ("config", "eval_results", "trainer_state"):
        change_json(run / f"{name}.json", with_more)
    change_json(
        run / "trainer_state.json", lambda state: state | {"log_history": list(map(with_more, state["log_history"]))}
    )
    change_snapshots(
        run / "topology", lambda found: found | {f"{k.rsplit('.', 1)[0]}.newer": v.clone() for k, v in found.items()}
    )
    (run / "topology/newer.jsonl").write_text("{}\n")
    _, table, drawn, said = read(run)
    _, before, drawn_before, said_before = read(RECORDED)
    assert table == before
    assert {title: one.alt for title, one in drawn.items()} == {title: one.alt for title, one in drawn_before.items()}
    assert said == said_before


@pytest.mark.parametrize(
    ("change", "method", "words"),
    [
        (with_more, "chts", "was read in part"),
        (lambda config: config | {"version": 99}, "chts", "was read in part"),
        (lambda config: config | {"method": "newest"}, "not known", "could not be read"),
    ],
)
def test_a_config_of_a_later_version(run, change, method, words):
    change_json(run / "sparsity_config.json", change)
    _, table, drawn, said = read(run)
    assert table == TABLE | {"Method": method}
    assert set(drawn) == TITLES - ({"Schedules"} if method == "not known" else set())
    assert words in said
    assert "sparsity_config.json" in said
    assert "earlier" not in said


def test_a_run_whose_config_was_lost_is_not_taken_for_a_dense_one(run):
    (run / "sparsity_config.json").unlink()
    _, table, drawn, said = read(run)
    assert table == TABLE | {"Method": "not known"}
    assert set(drawn) == TITLES - {"Schedules"}
    assert "dense" not in said


def test_nothing_that_a_record_names_is_imported(run, tmp_path, monkeypatch):
    (tmp_path / "named_by_a_record.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for parts in (["named_by_a_record"], [str(tmp_path / "named_by_a_record.py")]):
        # in a version that is read in part, and in one that is read whole
        for changes in ({"version": 99}, {}):
            change_json(run / "sparsity_config.json", lambda config, new=changes | {"parts": parts}: config | new)
            _, table, _, _ = read(run)
            assert table["Method"] == "chts"

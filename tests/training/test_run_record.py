"""The record of a run's topology: its counts are right, and the same whether the run was interrupted or not."""

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from cases import INTERVAL, STEPS, case_config, trainer
from tiny import tiny_llama
from transformers import TrainerCallback

from hf_chts import TopologyCallback, sparsify
from hf_chts.records import run_record
from hf_chts.records.run_record import RunRecord, read_lines
from hf_chts.records.snapshots import (
    load_snapshot,
    save_snapshot,
    snapshot_layers,
    snapshot_paths,
    snapshot_steps,
)


class Counted(TrainerCallback):
    """Counts from the masks themselves what each update did."""

    def __init__(self, run):
        self.run, self.seen = run, {}
        run.add_callback(self)

    def masks(self):
        return {name: mask.clone() for name, mask in self.run.sparse.masks().items()}

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = self.masks()
        self.union = self.masks()

    def on_step_end(self, args, state, control, **kwargs):
        now = self.masks()
        if any(not now[name].equal(mask) for name, mask in self.before.items()):
            rows = {}
            for name, mask in now.items():
                self.union[name] |= mask
                rows[name] = {
                    "links": sum(map(sum, mask.tolist())),
                    "come": int((mask & ~self.before[name]).sum()),
                    "gone": int((self.before[name] & ~mask).sum()),
                    "active": sum(any(row) for row in mask.tolist()) + sum(any(row) for row in mask.T.tolist()),
                    "explored": int(self.union[name].sum()),
                }
            self.seen[state.global_step] = rows
        self.before = now


@pytest.mark.parametrize("case", ["chtss", "chts, adaptive softness"])
def test_counts_are_those_of_the_masks(tmp_path, case):
    run = trainer(tmp_path, case, save_strategy="no")
    counted = Counted(run)
    run.train()
    header, *lines = read_lines(tmp_path / "topology/layers.jsonl")
    names = list(header["layers"])
    assert {name: tuple(shape) for name, shape in header["layers"].items()} == {
        name: tuple(mask.shape) for name, mask in run.sparse.masks().items()
    }
    assert [line["step"] for line in lines] == [4, 8, 12, 16]
    assert set(counted.seen) <= {4, 8, 12, 16}
    for line in lines:
        for index, name in enumerate(names):
            expected = counted.seen[line["step"]][name]
            row = {key: line[key][index] for key in line if key != "step"}
            assert {key: row[key] for key in ("links", "active", "explored")} == {
                key: expected[key] for key in ("links", "active", "explored")
            }
            # a link that returns in the same update neither came nor went; pruned ones that return are not counted
            unseen = row["regrown"] - row["returned"] - expected["come"]
            assert unseen == row["removed"] - row["returned"] - expected["gone"]
            assert unseen >= 0 if case == "chtss" else unseen == 0
            assert ("softness" in row) == ("softness" in case)
    assert any(value for line in lines for value in line["returned"])
    possible = sum(mask.numel() for mask in run.sparse.masks().values())
    explored = sum(int(mask.sum()) for mask in counted.union.values())
    assert run.evolver.history[-1]["itop"] == pytest.approx(explored / possible)
    seconds = read_lines(tmp_path / "topology/seconds.jsonl")
    assert [(line["step"], line["steps"]) for line in seconds] == [(4, 4), (8, 4), (12, 4), (16, 4), (24, 8)]
    assert all(0 <= line["topology_seconds"] <= line["seconds"] for line in seconds)
    assert [line["topology_seconds"] for line in seconds][:4] == [
        entry["topology_seconds"] for entry in run.evolver.history
    ]


# before and after the snapshot in the middle, at step 8
@pytest.mark.parametrize(("case", "checkpoint"), [("chtss", 12), ("chts, adaptive softness", 6)])
def test_an_interrupted_run_ends_with_the_records_of_one_that_was_not(tmp_path, case, checkpoint):
    whole = tmp_path / "whole"
    trainer(whole, case, save_steps=6).train()
    stopped = shutil.copytree(whole, tmp_path / "stopped")
    with open(stopped / "topology/layers.jsonl", "a") as file:
        file.write('{"step":20,"links":[3')  # it died while it wrote
    trainer(stopped, case, model=tiny_llama(seed=5), save_steps=6).train(
        resume_from_checkpoint=str(stopped / f"checkpoint-{checkpoint}")
    )
    names = {path.name for path in (whole / "topology").iterdir()}
    assert names == {
        "layers.jsonl", "plans.jsonl", "seconds.jsonl", "sizes.json",
        "snapshot-0.safetensors", "snapshot-8.safetensors", "snapshot-16.safetensors",
    }  # fmt: skip
    assert {path.name for path in (stopped / "topology").iterdir()} == names
    for name in names - {"seconds.jsonl"}:
        assert (stopped / "topology" / name).read_bytes() == (whole / "topology" / name).read_bytes(), name
    seconds = read_lines(stopped / "topology/seconds.jsonl")
    assert [line["step"] for line in seconds] == [4, 8, 12, 16, 24]
    # the first line after the resume counts from the checkpoint
    assert sum(line["steps"] for line in seconds) == STEPS - checkpoint % INTERVAL


def record(directory, method="chtss", max_steps=STEPS):
    sparse = sparsify(tiny_llama(), case_config(method))
    masks = sparse.masks()
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    return RunRecord(directory, shapes, sparse.config.plan(max_steps)), masks


def test_records_after_the_step_of_a_resume_are_dropped(tmp_path):
    trainer(tmp_path, save_strategy="no").train()
    topology = tmp_path / "topology"
    again, masks = record(tmp_path)
    again.begin(10, masks)
    assert [line["step"] for line in read_lines(topology / "layers.jsonl")[1:]] == [4, 8]
    assert [line["step"] for line in read_lines(topology / "seconds.jsonl")] == [4, 8]
    assert list(snapshot_paths(topology)) == [0, 8]
    again.begin(0, masks)
    assert len(read_lines(topology / "layers.jsonl")) == 1
    assert read_lines(topology / "seconds.jsonl") == []
    assert list(snapshot_paths(topology)) == [0]


def test_records_of_another_model_are_not_continued(tmp_path):
    trainer(tmp_path, model=tiny_llama(intermediate_size=80), save_strategy="no").train()
    again, masks = record(tmp_path)
    again.begin(10, masks)
    assert read_lines(tmp_path / "topology/layers.jsonl") == [again.header]
    assert list(snapshot_paths(tmp_path / "topology")) == []


def test_training_goes_on_if_the_record_cannot_be_written(tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_record, "_append", full)
    run = trainer(tmp_path, save_strategy="no")
    with caplog.at_level(logging.WARNING, logger="hf_chts.records.run_record"):
        run.train()
    assert run.state.global_step == STEPS
    assert len(caplog.records) == 1
    assert f"{tmp_path}/topology" in caplog.text
    assert "No space left" in caplog.text
    assert len(read_lines(tmp_path / "topology/layers.jsonl")) == 1


@pytest.mark.parametrize("zero", [True, False])
def test_rank_0_alone_writes(tmp_path, zero):
    callback = TopologyCallback(sparsify(tiny_llama(), case_config("set")))
    optimizer = torch.optim.AdamW(callback.evolver.sparse.model.parameters())
    state = SimpleNamespace(max_steps=STEPS, global_step=0, is_world_process_zero=zero)
    callback.on_train_begin(SimpleNamespace(output_dir=str(tmp_path)), state, None, optimizer=optimizer)
    assert (tmp_path / "topology").exists() == zero


def test_an_incomplete_line_ends_the_record(tmp_path):
    path = tmp_path / "layers.jsonl"
    assert read_lines(path) == []
    path.write_text('{"format": "x"}\n{"step": 4}\n{"step": 8}\n{"st\n{"step": 12}\n')
    assert read_lines(path) == [{"format": "x"}, {"step": 4}, {"step": 8}]
    path.write_text("\x00\x00")
    assert read_lines(path) == []


@pytest.mark.parametrize("shape", [(300, 700), (3, 5), (256, 257)])
def test_pictures_and_degrees(tmp_path, shape):
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(shape, generator=generator) < torch.rand(shape[1], generator=generator)
    save_snapshot(tmp_path / "snapshot-7.safetensors", {"a.b": mask})
    found = load_snapshot(tmp_path / "snapshot-7.safetensors")["a.b"]
    assert found.out_degrees.tolist() == [sum(row) for row in mask.tolist()]
    assert found.in_degrees.tolist() == [sum(column) for column in mask.T.tolist()]
    height, width = (min(side, 256) for side in shape)
    assert found.picture.shape == (height, width)
    for row in range(0, height, 17):
        for column in range(0, width, 13):
            cell = mask[
                row * shape[0] // height : (row + 1) * shape[0] // height,
                column * shape[1] // width : (column + 1) * shape[1] // width,
            ]
            assert found.picture[row, column].item() == pytest.approx(cell.float().mean().item(), abs=1e-3)


def test_a_damaged_snapshot_is_named(tmp_path):
    path = tmp_path / "snapshot-7.safetensors"
    save_snapshot(path, {"a": torch.ones(4, 4, dtype=torch.bool)})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"snapshot-7.safetensors cannot be used"):
        load_snapshot(path)


@pytest.mark.parametrize(
    ("method", "interval", "max_steps", "expected"),
    [
        ("set", 4, 24, [0, 8, 16]),  # updates at 4, 8, 12, 16, for 0.75 of 24 is 18
        ("set", 10, 100, [0, 40, 70]),  # seven updates: the fourth
        ("set", 10, 14, [0, 10]),  # one
        ("static", 10, 100, [0]),
    ],
)
def test_moments_of_the_snapshots(method, interval, max_steps, expected):
    config = case_config(method, update_interval=interval)
    assert snapshot_steps(config.plan(max_steps)) == expected


def test_layers_of_the_snapshots():
    llama = [f"model.layers.{i}.{part}" for i in range(12) for part in ("attn.q_proj", "attn.k_proj", "mlp.down_proj")]
    assert snapshot_layers(llama) == [
        "model.layers.0.attn.q_proj", "model.layers.11.attn.q_proj",
        "model.layers.0.mlp.down_proj", "model.layers.11.mlp.down_proj",
    ]  # fmt: skip
    assert snapshot_layers(["only"]) == ["only"]

"""Fewer slots than ranks, so that some ranks hold nothing of a layer: topology and weights are those of one process."""

import pytest
import torch

# beside this file
from few_slots_worker import train  # isort: skip
from launching import torchrun  # isort: skip

pytestmark = pytest.mark.distributed

ENGINES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize("compute", ["dense", "sparse"])
def test_fewer_slots_than_ranks(tmp_path, compute):
    pytest.importorskip("deepspeed")
    torchrun(3, "few_slots_worker.py", str(tmp_path), compute, *ENGINES)
    rooms, slots, weights = train("one", compute)
    assert {rooms[f"model.layers.0.self_attn.{name}_proj"] for name in "kvq"} == {1, 2, 210}
    for engine in ENGINES:
        found_rooms, found_slots, found_weights = torch.load(tmp_path / f"{engine}.pt")
        assert found_rooms == rooms
        for name, positions in slots.items():
            assert found_slots[name].equal(positions), f"{engine}: {name}"
            torch.testing.assert_close(found_weights[name], weights[name], rtol=0, atol=1e-4)

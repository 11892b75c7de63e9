"""The plain loop on two real ranks: DDP, FSDP2 and ZeRO; and the example of it."""

from pathlib import Path

import pytest
import torch

# beside this file
from launching import torchrun  # isort: skip
from plain_loop_worker import METHODS, PER_WEIGHT, train  # isort: skip

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def one_process():
    return {method: train("one", method) for method in [*METHODS, PER_WEIGHT]}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_loop_on_two_ranks(tmp_path, engine, one_process):
    if "zero" in engine:
        pytest.importorskip("deepspeed")
    torchrun(2, "plain_loop_worker.py", str(tmp_path), engine)
    found = torch.load(tmp_path / f"{engine}.pt")
    for method, (masks, sparsities, weights) in found.items():
        alone, sparsities_alone, weights_alone = one_process[method]
        assert sparsities == sparsities_alone, method
        for name, mask in masks.items():
            assert mask.sum() == alone[name].sum(), (method, name)
            # sums over ranks round otherwise than sums over micro-batches, so that near ties may fall otherwise
            assert (mask != alone[name]).sum() <= 0.02 * mask.numel(), (method, name)
            # Adam's steps of links with next to no gradient hang on the rounding too; without its own count of steps, a
            # link that was regrown four steps ago would be off by several times the learning rate
            off = (weights[name] - weights_alone[name])[mask & alone[name]].abs()
            assert off.quantile(0.95) < 1e-4, (method, name, off.max())


def test_the_example():
    done = torchrun(2, str(ROOT / "examples" / "fsdp2_loop.py"))
    lines = [line.split() for line in done.splitlines() if "sparsity" in line]
    assert [line[0] for line in lines] == ["10", "20"]
    assert lines[-1][-1] == "90.0%"

"""Topology changes through `engine_of` on real ranks of every engine, on the CPU; most checks are in the worker.

The engines train on the same data from the same weights, whatever the number of ranks, so they must end alike.
"""

import pytest
import torch

# beside this file
from engine_worker import run_case  # isort: skip
from launching import accelerate, torchrun  # isort: skip

pytestmark = pytest.mark.distributed

TORCH = ["ddp", "ddp-bf16", "fsdp2", "fsdp2-split", "fsdp2-bf16-checkpointing"]
ZERO = [
    "zero1", "zero1-bf16", "zero1-bf16-accumulate32", "zero2", "zero2-bf16", "zero2-offload",
    "zero3-split-checkpointing", "zero3-bf16", "zero3-bf16-persistent", "zero3-bf16-offload",
]  # fmt: skip
THREE_RANKS = ["ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3-persistent"]


@pytest.fixture(scope="module")
def one_process():
    return run_case("one")


@pytest.mark.parametrize(("ranks", "cases"), [(2, TORCH), (2, ZERO), (3, THREE_RANKS)], ids=["torch", "zero", "three"])
def test_topology_changes(tmp_path, ranks, cases, one_process):
    if any(case.startswith("zero") for case in cases):
        pytest.importorskip("deepspeed")
    torchrun(ranks, "engine_worker.py", str(tmp_path), *cases)
    for case in cases:
        weights = torch.load(tmp_path / f"{case}.pt")
        assert weights.keys() == one_process.keys()
        for name, expected in one_process.items():
            weight = weights[name].view(expected.shape)
            # bf16: Adam's six steps of 0.01, of which rounding turns a few round
            tolerance = 0.05 if "bf16" in case else 1e-4
            assert (weight - expected).abs().max() < tolerance, f"{case}: {name}"


@pytest.mark.parametrize(
    ("config", "options", "engine"),
    [
        ("cpu_fsdp2", [], "Fsdp2Weights"),
        ("cpu_zero3", [], "ZeroStage3Weights"),
    ],
)
def test_trainer_on_each_engine_and_resumed(tmp_path, config, options, engine):
    if "zero" in config:
        pytest.importorskip("deepspeed")
    accelerate(config, "trainer_worker.py", str(tmp_path), *options)
    kind, losses, weights = torch.load(tmp_path / "result.pt")
    assert kind == engine
    assert len(losses) == 6
    accelerate(config, "trainer_worker.py", str(tmp_path), *options, "resume")
    _, losses_again, weights_again = torch.load(tmp_path / "resumed.pt")
    assert losses_again == losses
    assert all(weights_again[name].equal(weight) for name, weight in weights.items())


def test_efficient_loading_keeps_masks(tmp_path):
    accelerate("cpu_fsdp2", "efficient_loading_worker.py", str(tmp_path))

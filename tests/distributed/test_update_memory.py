"""An update takes the memory of a few layers, not of the model, where ranks hold parts of it."""

import pytest
import torch

from launching import torchrun  # isort: skip - beside this file

pytestmark = pytest.mark.distributed

# fp32 copies of the largest layer: the gathered weight, and what its update takes. That is less than 6 for LLaMA's
# layers (benchmarks/topology_update.py), more for these small ones, whose products of (out, out) are larger beside them
COPIES = 12


def test_peak_memory_of_an_update(tmp_path):
    pytest.importorskip("deepspeed")
    torchrun(2, "memory_worker.py", str(tmp_path), "fsdp2", "zero3")
    for of_rank in torch.load(tmp_path / "memory.pt"):
        for name, (peak, layer, model) in of_rank.items():
            assert peak <= COPIES * layer, f"{name}: {peak / layer:.1f} copies"
            assert COPIES * layer < 0.15 * model  # so that this says something

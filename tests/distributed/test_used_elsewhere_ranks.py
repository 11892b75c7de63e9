"""A weight that a model uses past its layer's forward: masked, or refused by all ranks after the first step."""

import pytest
from launching import torchrun

pytestmark = pytest.mark.distributed


def test_on_two_ranks():
    torchrun(2, "elsewhere_worker.py", "ddp", "fsdp2", "fsdp2-bf16-checkpointing")


def test_under_deepspeed():
    pytest.importorskip("deepspeed")
    torchrun(2, "elsewhere_worker.py", "zero1", "zero2-bf16", "zero3", "zero3-bf16-offload")

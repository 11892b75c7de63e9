"""What one rank has of NaN stops all, at the same place, on each engine; the checks are in the worker."""

import pytest

from launching import accelerate  # isort: skip - beside this file

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize(
    ("config", "scenarios"),
    [
        ("cpu_ddp", ["gradient", "weight", "moment", "update", "dense gradient", "labels"]),
        ("cpu_fsdp2", ["gradient", "weight", "dense gradient"]),
        ("cpu_zero3", ["gradient"]),
        ("cpu_zero3", ["weight"]),
    ],
)
def test_both_ranks_stop(tmp_path, config, scenarios):
    if "zero" in config:
        pytest.importorskip("deepspeed")
    accelerate(config, "not_finite_worker.py", str(tmp_path), *scenarios)

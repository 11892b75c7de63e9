"""What a process holds in memory, and the most that it has held since training began."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

_at_start: list[float] = []


def training_begins() -> None:
    """Forget what was held before, where the system can: what reading data took is no part of training."""
    if _at_start:
        return
    with suppress(OSError):  # not Linux: the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
    _at_start.append(held_mib())


def held_mib() -> float:
    """MiB that the process holds now; the most that it has held where the system does not tell."""
    return _status("VmRSS")


def peak_mib() -> float:
    """The most MiB that the process has held, since training began if the system can tell."""
    return _status("VmHWM")


def _status(name: str) -> float:
    """MiB that Linux has under this name; elsewhere the peak of the process, or of its parent if that is higher."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) / 2**10 for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def memory_mib() -> dict[str, float]:
    """The peak since training began, and what was held then, with Python, its packages and the data."""
    before = _at_start[0] if _at_start else held_mib()
    return {"peak": max(peak_mib(), before), "before_training": before}  # systems count them at different times

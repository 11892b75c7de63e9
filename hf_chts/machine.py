"""What a program runs on, told and checked before the part that takes its time."""

import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def on_cpu() -> bool:
    """Whether a run that was told nothing belongs on the CPU: there is nothing else, or its launcher says so.

    Apple's GPUs do not count: they have no float64, in which topology updates draw their links.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t"):
        return True
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found is None or found.type == "mps"


def device_name(device: torch.device | str) -> str:
    """What its maker calls a device; its type where that cannot be told."""
    device = torch.device(device)
    try:
        if device.type == "cpu":
            cpuinfo = Path("/proc/cpuinfo")
            lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
            named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(named, "") or platform.processor() or platform.machine() or "cpu"
        return str(getattr(torch, device.type).get_device_name(device))
    except (OSError, RuntimeError, AssertionError, AttributeError, ValueError):  # as drivers will
        return device.type


def device_line(device: torch.device | str, *, processes: int = 1, dtype: str, unused: int = 0) -> str:
    """Where a program runs, in a line.

    Args:
        processes: that have one such device each.
        dtype: of weights and arithmetic.
        unused: devices beside it that this process does not use.
    """
    device = torch.device(device)
    several = f"{processes} processes, " if processes > 1 else ""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        where = f"the CPU, {device_name(device)}, {several}{threads} thread{'s' if threads > 1 else ''}"
        where += " each" if processes > 1 else ""
    else:
        where = f"{processes} × {device_name(device)} ({device})"
    beside = f"; {unused} more are there: start a process for each of them with accelerate launch" if unused else ""
    return f"{where}, {dtype}{beside}"


def version_of(name: str) -> str:
    """The version of a package: as installed, else what it says itself, as in a clone; or "unknown"."""
    try:
        found = metadata.version(name)
    except Exception:  # of damaged metadata too: a label is all that this is
        found = None
    if not found:
        try:
            found = getattr(__import__(name), "__version__", None)
        except Exception:
            found = None
    return str(found or "unknown")


def check_can_write(directory: str | Path, what: str) -> None:
    """That files can be made in a directory, which may not be there yet; nothing is left behind.

    Raises:
        OSError: they cannot; the message names `what` and the directory.
    """
    nearest = Path(directory).absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        if not nearest.is_dir():
            raise NotADirectoryError(f"{nearest} is a file")
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise type(error)(f"{what} {directory} cannot be written to: {error}. Name another place") from error


def without_fail(what: str, make: Any, *args: Any, **kwargs: Any) -> tuple[Any, str]:
    """Call what makes something that a result can do without: what it returned, or None and why, in a sentence."""
    try:
        return make(*args, **kwargs), ""
    except Exception as error:  # whatever it is, the result is worth more
        return None, f"{what} could not be made: {type(error).__name__}: {' '.join(str(error).split())}"

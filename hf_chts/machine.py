"""The machine that a program runs on: its devices, package versions, and where it can write."""

import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path

import torch


def on_cpu() -> bool:
    """Whether a run uses the CPU by default: there is nothing else, or its launcher's config says so.

    Apple's GPUs do not count, because topology updates need float64.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t"):
        return True
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found is None or found.type == "mps"


def device_name(device: torch.device | str) -> str:
    """The product name of a device, or its type if the driver does not give one."""
    device = torch.device(device)
    try:
        if device.type == "cpu":
            cpuinfo = Path("/proc/cpuinfo")
            lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
            named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(named, "") or platform.processor() or platform.machine() or "cpu"
        return str(getattr(torch, device.type).get_device_name(device))
    except (OSError, RuntimeError, AssertionError, AttributeError, ValueError):  # drivers differ
        return device.type


def device_line(device: torch.device | str, *, processes: int = 1, dtype: str, unused: int = 0) -> str:
    """One line that says where a program runs.

    Args:
        processes: number of processes, with one such device each.
        dtype: number format of weights and arithmetic, in words.
        unused: number of further devices, which no process uses.
    """
    device = torch.device(device)
    several = f"{processes} processes, " if processes > 1 else ""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        where = f"the CPU, {device_name(device)}, {several}{threads} thread{'s' if threads > 1 else ''}"
        where += " each" if processes > 1 else ""
    else:
        where = f"{processes} × {device_name(device)} ({device})"
    beside = f"; {unused} more are there: start one process for each with accelerate launch" if unused else ""
    return f"{where}, {dtype}{beside}"


def version_of(name: str) -> str:
    """The version of a package: of its installation, else its `__version__`, as in a clone, else "unknown"."""
    try:
        found = metadata.version(name)
    except Exception:  # damaged metadata too: this is only a label
        found = None
    if not found:
        try:
            found = getattr(__import__(name), "__version__", None)
        except Exception:
            found = None
    return str(found or "unknown")


def check_can_write(directory: str | Path, what: str) -> None:
    """Check that files can be created in a directory, which need not exist yet. Nothing is left behind.

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

"""Options of an evaluation, checked before anything is loaded."""

from pathlib import Path

import torch


def check_options(
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int | str,
    device: str | None = None,
    task_data: str | Path | None = None,
) -> None:
    """
    Raises:
        ValueError: a number is out of range, or there is no such device.
        FileNotFoundError: `task_data` is no directory.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: use at least 1 document per task, or None for all.")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot={num_fewshot}: use 0 or more examples, or None for each task's own number.")
    if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size >= 1):
        raise ValueError(f"batch_size={batch_size!r}: use 1 or more sequences, or 'auto'.")
    if device is not None:
        _check_device(device)
    if task_data is not None and not Path(task_data).is_dir():
        raise FileNotFoundError(
            f"task_data={str(task_data)!r} is no directory: it holds a folder per task, as in DIR/rte/validation.jsonl."
        )


def _check_device(device: str) -> None:
    # the harness takes a device that it does not know for the default one, and says nothing
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is no device: use cpu, cuda, cuda:1 or mps.") from error
    gpus = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= gpus:
        raise ValueError(f"device={device!r}: this machine shows {gpus} CUDA devices to this process.")

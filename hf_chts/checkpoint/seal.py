"""The seal of a checkpoint: written last, it names the run and lists every file with its size and checksum.

A checkpoint without a seal is incomplete, and cannot be resumed. CRC-32 detects damage, not forgery.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from hf_chts.checkpoint.topology_state import HISTORY_NAME, MASKS_NAME
from hf_chts.files.atomic import write_json
from hf_chts.files.reading import crc32, read_json, reading

SEAL_NAME = "checkpoint_seal.json"
_FORMAT = "hf_chts checkpoint, 1"
_IN_PROGRESS = "checkpoint-is-incomplete.txt"  # the Trainer removes it after a save at SIGTERM
_REMEDY = "Use an earlier checkpoint"


def seal(directory: str | Path, step: int, run: Mapping[str, Any] | None = None) -> None:
    """Mark `directory` as the complete checkpoint after `step` of `run` (`RunIdentity.to_dict`)."""
    directory = Path(directory)
    files = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in (SEAL_NAME, _IN_PROGRESS):
            files[name] = [path.stat().st_size, crc32(path)]
    contents = {"format": _FORMAT, "step": step, "files": files, **({"run": dict(run)} if run else {})}
    write_json(directory / SEAL_NAME, contents | {"checksum": _checksum(contents)})


def verify_seal(
    directory: str | Path, concerns: Callable[[str], bool] = lambda name: True, remedy: str = _REMEDY
) -> None:
    """Read every file of a checkpoint and compare it with the seal.

    Args:
        concerns: whether to check the file of this name, relative to `directory`.
        remedy: the end of messages about damage.

    Raises:
        FileNotFoundError: the seal, or a file that it lists, is missing.
        ValueError: a file or the seal has changed since it was written; the message names it.
    """
    directory = Path(directory)
    path = directory / SEAL_NAME
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no checkpoint at {directory}: give the directory of one")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {directory} {what_is_unsealed(directory)}")
    with reading(path, remedy):
        files = _sealed_files(path)
    for name, (size, checksum) in files.items():
        if not concerns(name):
            continue
        file = directory / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, and the seal lists it. {remedy}")
        found = file.stat().st_size
        if found != size:
            raise ValueError(f"{file} has {found} bytes, and had {size} when it was written. {remedy}")
        if crc32(file) != checksum:
            raise ValueError(f"{file} is damaged: its checksum does not match the seal. {remedy}")


def what_is_unsealed(directory: str | Path) -> str:
    """What a directory without a seal is and how to continue from it, as the end of a sentence."""
    state, masks, history = (
        (Path(directory) / name).is_file() for name in (TRAINER_STATE_NAME, MASKS_NAME, HISTORY_NAME)
    )
    if state and not masks:  # the Trainer writes its state last
        return (
            "is a checkpoint of a plain Trainer, without masks and seal. To continue from its weights, load the model "
            "with from_pretrained, and train without resume_from_checkpoint; only a plain Trainer can resume it"
        )
    if masks and not history:
        return (
            "is not a training checkpoint: it has masks, as exports do, but no training state. To continue from its "
            "weights and masks, load it with load_sparse, and train without resume_from_checkpoint"
        )
    return f"was not written or not copied completely. {_REMEDY}"


def sealed_run(directory: str | Path) -> dict[str, Any] | None:
    """The run that a checkpoint's seal names; None if it is unreadable or, as in early versions, names no run."""
    try:
        run = read_json(Path(directory) / SEAL_NAME).get("run")
    except (OSError, ValueError):  # verify_seal reports the damage to whoever uses the checkpoint
        return None
    return run if isinstance(run, dict) else None


def _sealed_files(path: Path) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 by file name, from a seal."""
    contents = read_json(path, _FORMAT)
    if contents.get("checksum", _checksum(contents)) != _checksum(contents):  # early versions have none
        raise ValueError("it does not match the checksum that was saved with it")
    files = {}
    for name, (size, checksum) in contents["files"].items():
        if not isinstance(size, int) or not isinstance(checksum, int) or Path(name).is_absolute() or ".." in name:
            raise ValueError(f"its entry for {name!r} is not a file of a checkpoint")
        files[name] = (size, checksum)
    return files


def _checksum(contents: Mapping[str, Any]) -> int:
    """The CRC-32 of a seal's contents, independent of order and spaces in its text."""
    others = {name: value for name, value in contents.items() if name != "checksum"}
    return zlib.crc32(json.dumps(others, sort_keys=True).encode())

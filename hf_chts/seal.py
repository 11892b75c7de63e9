"""The seal of a checkpoint: written last, it lists every file with its size and checksum.

A checkpoint of ours without it was not written whole, and is never resumed from. CRC-32 tells damage, not forgery.
"""

import json
import zlib
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from hf_chts.checkpoint import HISTORY_NAME, MASKS_NAME, write_whole

SEAL_NAME = "checkpoint_seal.json"
_FORMAT = "hf_chts checkpoint, 1"
_CHUNK = 1 << 22


def seal(directory: str | Path, step: int) -> None:
    """Seal what is in `directory` as the whole checkpoint after `step`."""
    directory = Path(directory)
    files = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != SEAL_NAME:
            files[name] = [path.stat().st_size, crc32(path)]
    text = json.dumps({"format": _FORMAT, "step": step, "files": files}, indent=1)
    write_whole(directory / SEAL_NAME, text.encode())


def verify_seal(directory: str | Path) -> None:
    """Read every file of a checkpoint and compare it with the seal.

    Raises:
        FileNotFoundError: the seal, or a file that it lists, is missing.
        ValueError: a file, or the seal, is not as it was written; the message names the file.
    """
    directory = Path(directory)
    path = directory / SEAL_NAME
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no checkpoint at {directory}: give the directory of one")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {directory} {what_is_unsealed(directory)}")
    try:
        files = _read(path)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be used: {error}. Take an earlier checkpoint") from error
    for name, (size, checksum) in files.items():
        file = directory / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, which the seal lists. Take an earlier checkpoint")
        found = file.stat().st_size
        if found != size:
            raise ValueError(
                f"{file} has {found} bytes, and had {size} when it was written. Take an earlier checkpoint"
            )
        if crc32(file) != checksum:
            raise ValueError(f"{file} is damaged: its checksum is not that of its seal. Take an earlier checkpoint")


def what_is_unsealed(directory: str | Path) -> str:
    """What a directory without a seal is, for the end of a sentence, and what to do about it."""
    state, masks, history = (
        (Path(directory) / name).is_file() for name in (TRAINER_STATE_NAME, MASKS_NAME, HISTORY_NAME)
    )
    if state and not masks:  # which the Trainer writes last
        return (
            "is a checkpoint of a plain Trainer, which has no masks and no seal. To go on from its weights, make the "
            "model of them with from_pretrained, and train without resume_from_checkpoint; only a Trainer can resume it"
        )
    if masks and not history:
        return (
            "is no checkpoint of a training: it has masks, but no state of a run, as exports do. To go on from its "
            "weights and masks, load it with load_sparse, and train without resume_from_checkpoint"
        )
    return "was not written whole, or not copied whole. Take an earlier checkpoint"


def last_sealed(output_dir: str | Path) -> str | None:
    """The last checkpoint of a run that was written whole; None if there is none."""
    if not Path(output_dir).is_dir():
        return None
    checkpoints = sort_checkpoints(str(output_dir))
    return next((path for path in reversed(checkpoints) if (Path(path) / SEAL_NAME).is_file()), None)


def _read(path: Path) -> dict[str, tuple[int, int]]:
    contents: Any = json.loads(path.read_text(encoding="utf-8"))
    if contents["format"] != _FORMAT:
        raise ValueError(f"its format is {contents['format']!r}, this hf_chts reads {_FORMAT!r}")
    files = {}
    for name, (size, checksum) in contents["files"].items():
        if not isinstance(size, int) or not isinstance(checksum, int) or Path(name).is_absolute() or ".." in name:
            raise ValueError(f"its entry for {name!r} is none of a checkpoint's files")
        files[name] = (size, checksum)
    return files


def crc32(path: Path) -> int:
    """The CRC-32 of a file of any size."""
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum

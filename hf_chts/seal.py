"""The seal of a checkpoint: written last, it lists every file with its size and checksum, and says of which run it is.

A checkpoint of ours without it was not written whole, and is never resumed from. CRC-32 tells damage, not forgery.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from hf_chts.checkpoint import HISTORY_NAME, MASKS_NAME
from hf_chts.files.atomic import write_whole

SEAL_NAME, RUN_NAME = "checkpoint_seal.json", "run_identity.json"
_FORMAT, _RUN_FORMAT = "hf_chts checkpoint, 1", "hf_chts run, 1"
_IN_PROGRESS = "checkpoint-is-incomplete.txt"  # which the Trainer removes when a save at SIGTERM is done
_CHUNK = 1 << 20


def seal(directory: str | Path, step: int, run: Mapping[str, Any] | None = None) -> None:
    """Seal what is in `directory` as the whole checkpoint after `step` of `run` (training/run_identity.py)."""
    directory = Path(directory)
    files = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in (SEAL_NAME, _IN_PROGRESS):
            files[name] = [path.stat().st_size, crc32(path)]
    contents = {"format": _FORMAT, "step": step, "files": files, **({"run": dict(run)} if run else {})}
    contents["checksum"] = _checksum(contents)
    write_whole(directory / SEAL_NAME, json.dumps(contents, indent=1).encode())


def verify_seal(directory: str | Path, concerns: Callable[[str], bool] = lambda name: True) -> None:
    """Read every file of a checkpoint and compare it with the seal.

    Args:
        concerns: says by its name whether a file is looked at.

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
        if not concerns(name):
            continue
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


def sealed_run(directory: str | Path) -> dict[str, Any] | None:
    """What a checkpoint's seal says of its run; None where it says nothing, as those of earlier versions."""
    try:
        run = json.loads((Path(directory) / SEAL_NAME).read_text(encoding="utf-8")).get("run")
    except (OSError, ValueError, AttributeError):  # damaged: who wants to use the checkpoint is told by verify_seal
        return None
    return run if isinstance(run, dict) else None


def sealed(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a run's folder that were written whole, by step; without those that were passed over."""
    passed_over = superseded(output_dir)
    return [path for path in all_sealed(output_dir) if passed_over.get(path.name) != crc32(path / SEAL_NAME)]


def all_sealed(output_dir: str | Path) -> list[Path]:
    """The same, with those that were passed over."""
    found = sort_checkpoints(str(output_dir)) if Path(output_dir).is_dir() else []
    return [Path(path) for path in found if (Path(path) / SEAL_NAME).is_file()]


def last_sealed(output_dir: str | Path) -> str | None:
    """The last checkpoint of a run that was written whole; None if there is none."""
    return next((str(path) for path in reversed(sealed(output_dir))), None)


def superseded(output_dir: str | Path) -> dict[str, int]:
    """Checkpoints that the run in a folder has passed over: of another run, or of steps that it has gone back before.

    By name, with the checksum of the seal: one that is written anew under the same name is the run's own.
    """
    try:
        found = json.loads((Path(output_dir) / RUN_NAME).read_text(encoding="utf-8"))["superseded"]
        return {str(name): int(checksum) for name, checksum in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # no run of this version has been here


def take_folder(output_dir: str | Path, run: Mapping[str, Any], passed_over: list[Path]) -> None:
    """Write down which run is in a folder, and which checkpoints there are none of it."""
    marks = {path.name: crc32(path / SEAL_NAME) for path in passed_over}
    contents = {"format": _RUN_FORMAT, "run": dict(run), "superseded": marks}
    write_whole(Path(output_dir) / RUN_NAME, json.dumps(contents, indent=1).encode())


def _read(path: Path) -> dict[str, tuple[int, int]]:
    contents: Any = json.loads(path.read_text(encoding="utf-8"))
    if contents["format"] != _FORMAT:
        raise ValueError(f"its format is {contents['format']!r}, this hf_chts reads {_FORMAT!r}")
    if _checksum(contents) != contents.get("checksum", _checksum(contents)):  # earlier versions have none
        raise ValueError("it does not have the checksum that was saved with it")
    files = {}
    for name, (size, checksum) in contents["files"].items():
        if not isinstance(size, int) or not isinstance(checksum, int) or Path(name).is_absolute() or ".." in name:
            raise ValueError(f"its entry for {name!r} is none of a checkpoint's files")
        files[name] = (size, checksum)
    return files


def _checksum(contents: Mapping[str, Any]) -> int:
    """Of a seal itself, whatever the order and spaces of its text."""
    others = {name: value for name, value in contents.items() if name != "checksum"}
    return zlib.crc32(json.dumps(others, sort_keys=True).encode())


def crc32(path: Path) -> int:
    """The CRC-32 of a file of any size."""
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum

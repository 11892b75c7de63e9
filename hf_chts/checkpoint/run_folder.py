"""The output folder of a run: its complete checkpoints, the run that each belongs to, and a lock during training."""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.trainer_utils import sort_checkpoints

from hf_chts.checkpoint.run_identity import RunIdentity
from hf_chts.checkpoint.seal import SEAL_NAME, sealed_run
from hf_chts.files.atomic import write_json
from hf_chts.files.reading import crc32, read_json

RUN_NAME = "run_identity.json"
LOCK_NAME = "training.lock"
_FORMAT = "hf_chts run, 1"

_log = logging.getLogger(__name__)


def sealed(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of the run in a folder, by step, without superseded ones."""
    ignored = superseded_seals(output_dir)
    return [path for path in all_sealed(output_dir) if ignored.get(path.name) != crc32(path / SEAL_NAME)]


def all_sealed(output_dir: str | Path) -> list[Path]:
    """All complete checkpoints in a folder, by step, including those of other runs."""
    found = sort_checkpoints(str(output_dir)) if Path(output_dir).is_dir() else []
    return [Path(path) for path in found if (Path(path) / SEAL_NAME).is_file()]


def last_sealed(output_dir: str | Path) -> str | None:
    """The last complete checkpoint of the run in a folder; None if there is none."""
    return next((str(path) for path in reversed(sealed(output_dir))), None)


def superseded_seals(output_dir: str | Path) -> dict[str, int]:
    """Checkpoints in a folder that its run ignores: those of another run, or of later steps than it resumed from.

    Returns:
        The CRC-32 of the seal by checkpoint name. With another seal, the run has written that checkpoint anew.
    """
    try:
        return {str(name): int(value) for name, value in read_json(Path(output_dir) / RUN_NAME)["superseded"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # early versions do not write the file


def claim_folder(output_dir: str | Path, run: Mapping[str, Any], superseded: list[Path]) -> None:
    """Record the run that a folder belongs to, and the checkpoints in it that do not belong to this run."""
    marks = {path.name: crc32(path / SEAL_NAME) for path in superseded}
    write_json(Path(output_dir) / RUN_NAME, {"format": _FORMAT, "run": dict(run), "superseded": marks})


def refuse_folder_of_another_run(output_dir: str, mine: set[str | None], *, overwrite: bool) -> None:
    """Raises ValueError if a folder has complete checkpoints of another run, unless `overwrite` is set.

    Args:
        mine: the ids of this run and of earlier runs of the same trainer.
    """
    foreign = [path for path in sealed(output_dir) if (sealed_run(path) or {}).get("id") not in mine]
    if foreign and not overwrite:
        last = foreign[-1]
        identity = RunIdentity.of_checkpoint(last)
        of = f" ({identity})" if identity else ""
        raise ValueError(
            f"{output_dir} has checkpoints of another run{of}, up to {last.name}, and this run would mix with it: "
            "continue that run (resume_from_checkpoint true), choose another output_dir, or start over in this folder "
            "with overwrite_output_dir true (SparseTrainingArguments), which ignores its checkpoints"
        )


def not_of_this_run(output_dir: str, checkpoint: str | None, step: int) -> list[Path]:
    """The complete checkpoints in a folder that do not belong to the run that is about to train there.

    Args:
        checkpoint: what the run resumes from; None if it starts at 0.
        step: of `checkpoint`. Later checkpoints of the same run are included.
    """
    there, kept = all_sealed(output_dir), set[Path]()
    if checkpoint is not None and Path(checkpoint).resolve().parent == Path(output_dir).resolve():
        own = RunIdentity.of_checkpoint(checkpoint)
        for path in {*sealed(output_dir), *(path for path in there if path.name == Path(checkpoint).name)}:
            found = RunIdentity.of_checkpoint(path)
            same = own is None or found is None or found.id == own.id
            if same and int(path.name.rsplit("-", 1)[1]) <= step:
                kept.add(path)
    return [path for path in there if path not in kept]


class OutputLock:
    """A lock of the operating system on a folder, so that two runs never train there at once.

    It is released when its process ends, even by SIGKILL. Rank 0 takes it for all ranks of a job.
    """

    def __init__(self) -> None:
        self._lock: FileLock | None = None

    def take(self, output_dir: str | Path) -> None:
        """Take the lock; log a warning if the file system has no locks, as some network file systems.

        Raises:
            ValueError: another run holds it.
        """
        self.release()
        path = Path(output_dir) / LOCK_NAME
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(str(path))
            with warnings.catch_warnings():
                # with this warning filelock falls back to a file that a killed run would leave behind
                warnings.filterwarnings("error", message="flock not supported")
                lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"another run is training in {output_dir} (it holds {path}), and the two would overwrite each other: "
                "wait for it, stop it, or give this run another output_dir"
            ) from error
        except (OSError, NotImplementedError, UserWarning) as error:
            _log.warning(
                "%s cannot be locked (%s), so a second run in the same folder would go unnoticed: make sure that there "
                "is none",
                output_dir,
                error,
            )
            return
        self._lock = lock

    def release(self) -> None:
        """Release the lock if it is held. The file stays: another run may be about to lock it."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

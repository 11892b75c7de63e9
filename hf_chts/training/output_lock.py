"""Two runs never write into one folder at the same time: a lock of the operating system, held while training.

It goes with the process that has it, however that ends. Ranks of one job are one run, so rank 0 alone takes it.
"""

import logging
import warnings
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_NAME = "training.lock"

_log = logging.getLogger(__name__)


class OutputLock:
    """The lock of one folder; `release` may be called without it."""

    def __init__(self) -> None:
        self._lock: FileLock | None = None

    def take(self, output_dir: str | Path) -> None:
        """Take it; where the file system has no locks, as some network ones, or nothing can be written, say so.

        Raises:
            ValueError: another run has it.
        """
        self.release()
        path = Path(output_dir) / LOCK_NAME
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(str(path))
            with warnings.catch_warnings():
                # filelock would make do with a file that stays behind a run that was killed, and says so in passing
                warnings.filterwarnings("error", message="flock not supported")
                lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"another run is training in {output_dir} at this moment (it holds {path}), and the two would "
                "overwrite each other: wait for it, end it, or give this run another output_dir"
            ) from error
        except (OSError, NotImplementedError, UserWarning) as error:
            _log.warning(
                "%s cannot be locked (%s), so that a second run in the same folder would not be found out: see to it "
                "that there is none",
                output_dir,
                error,
            )
            return
        self._lock = lock

    def release(self) -> None:
        """The file stays: removed, it could be another one than the one that a run is about to lock."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

"""The commands of `hf-chts`: app.py has them all, the longer ones in files of their own."""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# what is told in one line
TOLD = (ValueError, OSError, ImportError)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """End the program with status 1 and one line, "PROGRAM: message", on an error of `TOLD` in the block.

    These say what the user can put right, and so does an ImportError of a package that an option needs. Any other
    exception is a bug and keeps its traceback.
    """
    try:
        yield
    except TOLD as error:
        raise refusal(program, error) from error


def refusal(program: str, error: Exception) -> SystemExit:
    """SystemExit with the message of `error` in one line."""
    return SystemExit(f"{program}: {' '.join(str(error).split())}")


def without_fail(what: str, make: Any, *args: Any, **kwargs: Any) -> tuple[Any, str]:
    """Call `make` for something that the user can do without. Returns what it made, or None and a sentence on why."""
    try:
        return make(*args, **kwargs), ""
    except Exception as error:  # the trained model or the results are worth more
        return None, f"{what} could not be made: {type(error).__name__}: {' '.join(str(error).split())}"


def end_rank() -> None:
    """End this process with status 0 if a launcher started it; else do nothing. The last line of a script.

    Exit hooks run and output is flushed, but Python is not taken down: before Python 3.14, a thread of C++ that then
    still comes back to Python, as gloo's may, ends the process by "terminate called without an active exception"
    (SIGABRT), and the launcher calls a run that has done all its work a failure.
    """
    if "WORLD_SIZE" in os.environ:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

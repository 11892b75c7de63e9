"""The commands of `hf-chts`: app.py has them all, the longer ones in files of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """End the program with status 1 and one line, "PROGRAM: message", on a ValueError or OSError in the block.

    These say what the user can put right. Any other exception is a bug and keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
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

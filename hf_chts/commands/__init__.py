"""The commands of `hf-chts`: app.py has them all, the longer ones in files of their own."""

from collections.abc import Iterator
from contextlib import contextmanager


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

"""Errors on the way to the Hub: retried where that can help, and explained in one sentence."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RevisionNotFoundError

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

TRIES = 5
_LONGEST_WAIT = 300.0  # seconds: the Hub counts requests over five minutes
_TRANSIENT = (408, 429, 500, 502, 503, 504)


class PushFailed(OSError):
    """A push was refused or interrupted; the message says why, and what to do."""


def retried(call: Callable[[], Answer], what: str) -> Answer:
    """The answer to a request, which is tried up to `TRIES` times.

    It is repeated after too many requests (429), server errors and lost connections, after the seconds that the server
    asks for, or 1, 2, 4, 8.

    Args:
        call: a request that may be made twice without harm.
        what: it does, for the log.

    Raises:
        What the last try raised, or any other error at once.
    """
    for number in range(1, TRIES + 1):
        try:
            return call()
        except HTTPError as error:
            asked = _retry_after(error)
            wait = 2.0 ** (number - 1) if asked is None else asked
            if not _transient(error) or number == TRIES or wait > _LONGEST_WAIT:
                raise
            logger.warning("%s: %s. Trying again in %.0f s (%d of %d)", what, _short(error), wait, number + 1, TRIES)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def reason(error: Exception, repo_id: str) -> str:
    """What went wrong and what to do about it, without the token."""
    hub = constants.ENDPOINT
    settings = f"{hub}/settings/tokens"
    # the client wraps the error of an upload
    cause = error.__cause__
    while isinstance(cause, Exception) and not isinstance(error, HTTPError):
        error, cause = cause, cause.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not contacted: unset it"
    if not isinstance(error, HfHubHTTPError):
        if isinstance(error, HTTPError):
            return f"the connection to {hub} failed ({_short(error)})"
        return _short(error)
    status = error.response.status_code
    if status == 401:
        return (
            f"{hub} refuses the token (401): log in with `hf auth login`, or set HF_TOKEN to a token with write access "
            f"from {settings}"
        )
    if status == 403:
        return (
            f"the token may not write to {repo_id} (403): use one with write access to it from {settings}, or a "
            "repository of your own"
        )
    if status == 429:
        return f"{hub} refuses too many requests (429), even after waiting: try again later"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision: use the name of a branch"
    if status == 404:
        return f"{repo_id} does not exist on {hub}, or the token may not see it (404)"
    if status >= 500:
        return f"{hub} fails with {status}, even after waiting: try again later"
    return f"{hub} answers {status}: {_short(error)}"


def _transient(error: HTTPError) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT
    return True  # no answer at all


def _retry_after(error: HTTPError) -> float | None:
    value = error.response.headers.get("Retry-After") if isinstance(error, HfHubHTTPError) else None
    try:
        return max(0.0, float(value)) if value is not None else None
    except ValueError:  # a date
        return None


def _short(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

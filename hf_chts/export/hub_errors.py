"""What goes wrong on the way to the Hub: said in one sentence, and tried again where that can help."""

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
    """A push that was refused or broken off; the message says why, and what to do."""


def retried(call: Callable[[], Answer], what: str) -> Answer:
    """The answer to `call`, which is made up to `TRIES` times.

    It is made again after too many requests (429), errors of the server and lost connections, after as many seconds as
    the server asks for, or 1, 2, 4, 8.

    Args:
        call: a request that does no harm when it is made twice.
        what: it does, for the log.

    Raises:
        Whatever the last try raised, or another error than those.
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
    """What went wrong, and what to do about it; no token is in it."""
    hub = constants.ENDPOINT
    settings = f"{hub}/settings/tokens"
    # the client wraps what an upload failed with
    cause = error.__cause__
    while isinstance(cause, Exception) and not isinstance(error, HTTPError):
        error, cause = cause, cause.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked: unset it"
    if not isinstance(error, HfHubHTTPError):
        if isinstance(error, HTTPError):
            return f"the connection to {hub} was lost or could not be made ({_short(error)})"
        return _short(error)
    status = error.response.status_code
    if status == 401:
        return (
            f"{hub} refuses the token (401): log in with `hf auth login`, or set HF_TOKEN to a token with write access "
            f"from {settings}"
        )
    if status == 403:
        return (
            f"the token may not write to {repo_id} (403): take one with write access to it from {settings}, or a "
            "repository of your own"
        )
    if status == 429:
        return f"{hub} answers that there were too many requests (429), and still did after waiting: try again later"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision: name a branch"
    if status == 404:
        return f"there is no {repo_id} on {hub}, or the token may not see it (404)"
    if status >= 500:
        return f"{hub} fails with {status}, and still did after waiting: try again later"
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

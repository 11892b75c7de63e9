"""Loops that numba compiles for the processor they run on, and the threads they run on.

numba is an extra (`pip install "hf_chts[cpu]"`): import the modules of this room only where `available()`.
"""

import functools
import importlib.util
import logging

_log = logging.getLogger(__name__)


@functools.cache
def available() -> bool:
    """Whether numba's loops run here."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        from hf_chts.kernels import threads  # late: imports numba
    except Exception as error:  # a numba that does not fit to numpy or to this Python says so in many ways
        _log.warning("numba is installed and does not run (%s): torch's own operators take its place", error)
        return False
    return threads.works()

"""Text for consoles and log files that do not take every character: LANG=C, an old Windows code page."""

import codecs
import sys
from typing import Any

# what our lines and tables hold beyond ASCII; the rest becomes a question mark
_INSTEAD = {
    "−": "-", "–": "-", "─": "-", "±": "+-", "×": "x", "·": ".", "…": "...", "’": "'", "δ": "delta ", "ζ": "zeta",
}  # fmt: skip
_HANDLER = "hf_chts.plain"


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_INSTEAD.get(character, "?") for character in error.object[error.start : error.end]), error.end


codecs.register_error(_HANDLER, _plain)


def printable(text: str, stream: Any = None) -> str:
    """`text` as `stream` (None: stdout) can take it; a character that it cannot becomes one that looks like it."""
    encoding = getattr(stream or sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, _HANDLER).decode(encoding)


def print_anything() -> None:
    """From here on, what a program prints never fails over a character that its output does not take."""
    stream: Any = sys.stdout  # stderr takes everything as it is
    utf8 = str(getattr(stream, "encoding", "")).lower().replace("_", "-") in ("utf-8", "utf8")
    # with UTF-8 anything but "strict" is a choice, such as to print the names of files as they are
    if hasattr(stream, "reconfigure") and (stream.errors == "strict" or not utf8):
        stream.reconfigure(errors=_HANDLER)

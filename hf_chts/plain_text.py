"""Text for consoles and log files that cannot encode every character: LANG=C, an old Windows code page."""

import codecs
import sys
from typing import Any

# the characters beyond ASCII in our lines and tables; any other becomes a question mark
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
    """`text` with characters that `stream` (None: stdout) cannot encode replaced by similar ones."""
    encoding = getattr(stream or sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, _HANDLER).decode(encoding)


def print_anything() -> None:
    """From here on, printing never fails over a character that stdout cannot encode."""
    stream: Any = sys.stdout  # stderr escapes such characters by default
    utf8 = str(getattr(stream, "encoding", "")).lower().replace("_", "-") in ("utf-8", "utf8")
    # with UTF-8 any handler but "strict" was chosen by someone, for example to print the names of files as they are
    if hasattr(stream, "reconfigure") and (stream.errors == "strict" or not utf8):
        stream.reconfigure(errors=_HANDLER)

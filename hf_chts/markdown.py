"""Text from outside in Markdown: names of runs, models and data sets are shown as they are, and never mean anything."""

import re
from html import escape
from urllib.parse import quote

# what begins or ends something inside a line, also on the Hub: links, code, emphasis, table cells, formulas
_MEANING = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")


def inline(text: object) -> str:
    """A text as it is, inside a line or a cell of a table: no HTML, no link, no emphasis, no line break."""
    return _MEANING.sub(r"\\\g<0>", escape(_line(text), quote=False))


def code(text: object) -> str:
    """A text as code in a cell of a table."""
    line = _line(text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"


def picture(alt: object, *path: str) -> str:
    """A picture in the file of this relative path."""
    return f"![{inline(alt)}]({quote('/'.join(path))})"


def _line(text: object) -> str:
    return "".join(character if character.isprintable() else " " for character in str(text))

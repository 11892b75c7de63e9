"""Text from outside in Markdown: names of runs, models and data sets are shown as they are, and never as markup."""

import re
from html import escape
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

# what begins or ends something inside a line, also on the Hub: links, code, emphasis, table cells, formulas
_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")


def inline(text: object) -> str:
    """Text as it is, inside a line or a cell of a table: no HTML, no link, no emphasis, no line break."""
    return _SPECIAL.sub(r"\\\g<0>", escape(_line(text), quote=False))


def code(text: object) -> Markup:
    """Text as code, in a line or a cell of a table."""
    line = _line(text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return Markup(f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}")


def picture(alt: object, *path: str) -> str:
    """A picture in the file of this relative path."""
    return f"![{inline(alt)}]({quote('/'.join(path))})"


def with_section(text: str, title: str, body: str) -> str:
    """A text with this section of the second level: in the place of the one with the same title, else at the end."""
    heading = f"\n## {title}\n"
    before, found, after = text.partition(heading)
    if not found:
        return f"{text.rstrip()}\n{heading}\n{body}\n"
    _, following, rest = after.partition("\n## ")
    return f"{before}{heading}\n{body}\n{following}{rest}"


def environment(package: str) -> Environment:
    """The templates of a package. Every value they insert is escaped by `inline`, unless it is `Markup`."""

    def escaped(value: Any) -> Any:
        return value if isinstance(value, Markup) else inline(value)

    templates = Environment(
        loader=PackageLoader(package),
        finalize=escaped,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    templates.filters["code"] = code
    return templates


def _line(text: object) -> str:
    return "".join(character if character.isprintable() else " " for character in str(text))

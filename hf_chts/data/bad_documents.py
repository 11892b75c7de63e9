"""Documents that cannot be trained on: how they are recognized, and what becomes of them."""

import functools
import logging
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

from hf_chts.data.arguments import OnBadDocument

logger = logging.getLogger(__name__)

# without a policy, bad documents are skipped while they are at most _FEW, or at most _SHARE of those read; the share
# means nothing before _ENOUGH have been read
_FEW, _SHARE, _ENOUGH = 10, 0.01, 100
# warnings; an epoch of a large corpus may have thousands of bad documents
_WARNED_OF = 10


@dataclass(frozen=True)
class Unreadable:
    """Stands for a document's text that cannot be read, with the reason."""

    reason: str


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be trained on: its file and place in it, and the reason."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


# None and "" stand for a row without text, which does not count as a document
ReadDocument: TypeAlias = str | BadDocument | None


def text_or_reason(value: Any, text_column: str) -> str | Unreadable | None:
    """A document's text as a tokenizer takes it, or why it has none."""
    if isinstance(value, str):
        if value.isascii():
            return value
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code, position = ord(value[error.start]), error.start
            return Unreadable(
                f"a byte that is not UTF-8 (0x{code - 0xDC00:02X}) at character {position}"
                if 0xDC80 <= code <= 0xDCFF  # as "surrogateescape" decodes it
                else f"a lone surrogate (U+{code:04X}) at character {position}"
            )
        return value
    if value is None or isinstance(value, Unreadable):
        return value
    return Unreadable(f"column {text_column!r} holds {type(value).__name__}, not text")


class DocumentFilter:
    """Lets one reader's good documents through, and counts the others.

    Args:
        on_bad_document: "error" to raise at the first bad one, "skip" to skip all of them, None to skip them as long as
            they are few.
        read, skipped: the counts to start from.

    Attributes:
        read: documents so far, bad ones included, rows without text not.
        skipped: bad documents so far.
        first: the first bad document.
    """

    def __init__(self, on_bad_document: OnBadDocument | None = None, read: int = 0, skipped: int = 0) -> None:
        self.on_bad_document = on_bad_document
        self.read, self.skipped = read, skipped
        self.first: BadDocument | None = None

    def __call__(self, document: ReadDocument) -> TypeGuard[str]:
        """Whether to take the document.

        Raises:
            ValueError: it is bad and an error, or one bad document too many; the message names its place.
        """
        if not document:
            return False
        self.read += 1
        if isinstance(document, str):
            return True
        if self.on_bad_document == "error":
            raise ValueError(
                f"{document}. Repair or remove it, set text_column to a column of text, or skip such documents with "
                "on_bad_document: skip"
            )
        self.skipped += 1
        self.first = self.first or document
        if self.skipped <= _WARNED_OF:
            last = ", and further ones are only counted" if self.skipped == _WARNED_OF else ""
            _warn_once(f"{document}: skipped{last}")
        if self.on_bad_document is None and self.read >= _ENOUGH and self.skipped > max(_FEW, _SHARE * self.read):
            raise ValueError(
                f"{self.skipped} of the {self.read} documents that one reader has read are bad, more than "
                f"{_SHARE:.0%}; the last one is {document}. Repair the files or set text_column to a column of text; "
                "or set on_bad_document to skip, which allows any number of them, and resume from the last checkpoint"
            )
        return False


@functools.lru_cache(maxsize=1000)
def _warn_once(message: str) -> None:
    """Once per process: each epoch meets the same documents again."""
    logger.warning(message)

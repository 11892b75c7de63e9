"""Documents that cannot be trained on: how they are told from others, and what becomes of them."""

import functools
import logging
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

from hf_chts.data.arguments import OnBadDocument

logger = logging.getLogger(__name__)

# where they are skipped as long as they are few: more than _FEW and more than the share, among at least _ENOUGH read
_FEW, _SHARE, _ENOUGH = 10, 0.01, 100
# each of the first ones is told of; an epoch of a large corpus may have thousands
_TOLD = 10


@dataclass(frozen=True)
class Unreadable:
    """What a reader finds in place of a document's text, and why."""

    reason: str


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be trained on: its file and place in it, and the reason."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


# None and "" stand for a row without text, which is no document
Document: TypeAlias = str | BadDocument | None


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
                f"a byte that is no UTF-8 (0x{code - 0xDC00:02X}) at character {position}"
                if 0xDC80 <= code <= 0xDCFF  # as "surrogateescape" decodes it
                else f"a lone surrogate (U+{code:04X}) at character {position}"
            )
        return value
    if value is None or isinstance(value, Unreadable):
        return value
    return Unreadable(f"column {text_column!r} holds {type(value).__name__}, not text")


class Sieve:
    """Lets the documents of one reader through that have text, and counts.

    Args:
        on_bad_document: "error" to raise at the first bad one, "skip" to leave all of them out, None to leave them out
            as long as they are few.
        read, skipped: what was counted before.

    Attributes:
        read: documents so far, bad ones among them; rows without text are no documents.
        skipped: those that were left out.
        first: the first of them.
    """

    def __init__(self, on_bad_document: OnBadDocument | None = None, read: int = 0, skipped: int = 0) -> None:
        self.on_bad_document = on_bad_document
        self.read, self.skipped = read, skipped
        self.first: BadDocument | None = None

    def __call__(self, document: Document) -> TypeGuard[str]:
        """Whether to take the document.

        Raises:
            ValueError: it is bad, and bad ones are not left out or have become too many; the message names its place.
        """
        if not document:
            return False
        self.read += 1
        if isinstance(document, str):
            return True
        if self.on_bad_document == "error":
            raise ValueError(
                f"{document}. Mend or remove it, set text_column to a column of text, or leave such documents out with "
                "on_bad_document: skip"
            )
        self.skipped += 1
        self.first = self.first or document
        if self.skipped <= _TOLD:
            _tell(f"{document}: left out" + (", and further ones are only counted" if self.skipped == _TOLD else ""))
        if self.on_bad_document is None and self.read >= _ENOUGH and self.skipped > max(_FEW, _SHARE * self.read):
            raise ValueError(
                f"{self.skipped} of the {self.read} documents that one reader has read are bad, more than "
                f"{_SHARE:.0%}; the last one is {document}. Mend the files or set text_column to a column of text; or "
                "set on_bad_document to skip, which leaves any number of them out, and resume from the last checkpoint"
            )
        return False


@functools.lru_cache(maxsize=1000)
def _tell(message: str) -> None:
    """A warning, once a process: the same documents are read again in the next epoch, or to make other blocks."""
    logger.warning(message)

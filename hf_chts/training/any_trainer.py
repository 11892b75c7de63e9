"""The base class of the mixins here: they go before any Trainer class, and are none themselves."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer as AnyTrainer
else:
    AnyTrainer = object

__all__ = ["AnyTrainer"]

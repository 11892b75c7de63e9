"""What models are trained on: random inputs of each kind, with labels that fit them, and the Auto class of the task."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tiny import VOCABULARY
from torch import Generator, Tensor

LENGTH = 12
CLASSES = 3
SIDE = 16  # of an image, in pixels
IMAGE = VOCABULARY - 1  # the token that stands for a patch of an image
PATCHES = 4


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        name: in docs/architectures.md.
        auto: name of transformers' Auto class for it.
        batch: (size, generator) → inputs and labels.
    """

    name: str
    auto: str
    batch: Callable[[int, Generator], dict[str, Any]]


def tokens(size: int, generator: Generator, length: int = LENGTH) -> Tensor:
    """(size, length), without special tokens."""
    return torch.randint(3, IMAGE, (size, length), generator=generator)


def classes(*shape: int, generator: Generator) -> Tensor:
    return torch.randint(0, CLASSES, shape, generator=generator)


def pixels(size: int, generator: Generator) -> Tensor:
    return torch.randn(size, 3, SIDE, SIDE, generator=generator)


def _causal(size: int, generator: Generator) -> dict[str, Any]:
    ids = tokens(size, generator)
    return {"input_ids": ids, "labels": ids}


def _masked(size: int, generator: Generator) -> dict[str, Any]:
    ids = tokens(size, generator)
    hidden = torch.arange(LENGTH) % 3 == 1
    return {"input_ids": ids.where(~hidden, 3), "labels": ids.where(hidden, -100)}


def _seq2seq(size: int, generator: Generator) -> dict[str, Any]:
    return {"input_ids": tokens(size, generator), "labels": tokens(size, generator, 8)}


def _sequences(size: int, generator: Generator) -> dict[str, Any]:
    return {"input_ids": tokens(size, generator), "labels": classes(size, generator=generator)}


def _tokens(size: int, generator: Generator) -> dict[str, Any]:
    return {"input_ids": tokens(size, generator), "labels": classes(size, LENGTH, generator=generator)}


def _replaced(size: int, generator: Generator) -> dict[str, Any]:
    labels = torch.randint(0, 2, (size, LENGTH), generator=generator)
    return {"input_ids": tokens(size, generator), "labels": labels}


def _questions(size: int, generator: Generator) -> dict[str, Any]:
    start, end = torch.randint(0, LENGTH, (2, size), generator=generator)
    return {"input_ids": tokens(size, generator), "start_positions": start, "end_positions": end}


def _images(size: int, generator: Generator) -> dict[str, Any]:
    return {"pixel_values": pixels(size, generator), "labels": classes(size, generator=generator)}


def _segments(size: int, generator: Generator) -> dict[str, Any]:
    return {"pixel_values": pixels(size, generator), "labels": classes(size, SIDE, SIDE, generator=generator)}


def _pairs(size: int, generator: Generator) -> dict[str, Any]:
    return {"input_ids": tokens(size, generator), "pixel_values": pixels(size, generator), "return_loss": True}


def _image_and_text(size: int, generator: Generator) -> dict[str, Any]:
    ids = tokens(size, generator)
    ids[:, :PATCHES] = IMAGE
    return {"input_ids": ids, "pixel_values": pixels(size, generator), "labels": ids.where(ids != IMAGE, -100)}


def _visual_questions(size: int, generator: Generator) -> dict[str, Any]:
    labels = torch.rand(size, CLASSES, generator=generator)
    return {"input_ids": tokens(size, generator), "pixel_values": pixels(size, generator), "labels": labels}


def _speech_to_text(size: int, generator: Generator) -> dict[str, Any]:
    features = torch.randn(size, 8, 32, generator=generator)
    return {"input_features": features, "labels": tokens(size, generator, 8)}


def _speech(size: int, generator: Generator) -> dict[str, Any]:
    waves = torch.randn(size, 400, generator=generator)
    return {"input_values": waves, "labels": tokens(size, generator, 4)}


def _spectrograms(size: int, generator: Generator) -> dict[str, Any]:
    values = torch.randn(size, SIDE, SIDE, generator=generator)
    return {"input_values": values, "labels": classes(size, generator=generator)}


CAUSAL = Task("text", "AutoModelForCausalLM", _causal)
MASKED = Task("masked text", "AutoModelForMaskedLM", _masked)
SEQ2SEQ = Task("text to text", "AutoModelForSeq2SeqLM", _seq2seq)
SEQUENCES = Task("classes of texts", "AutoModelForSequenceClassification", _sequences)
TOKENS = Task("classes of tokens", "AutoModelForTokenClassification", _tokens)
REPLACED = Task("replaced tokens", "AutoModelForPreTraining", _replaced)
QUESTIONS = Task("questions", "AutoModelForQuestionAnswering", _questions)
IMAGES = Task("classes of images", "AutoModelForImageClassification", _images)
SEGMENTS = Task("segments of images", "AutoModelForSemanticSegmentation", _segments)
PAIRS = Task("pairs of image and text", "AutoModelForZeroShotImageClassification", _pairs)
IMAGE_AND_TEXT = Task("image to text", "AutoModelForImageTextToText", _image_and_text)
VISUAL_QUESTIONS = Task("questions about images", "AutoModelForVisualQuestionAnswering", _visual_questions)
SPEECH_TO_TEXT = Task("speech to text", "AutoModelForSpeechSeq2Seq", _speech_to_text)
SPEECH = Task("speech (CTC)", "AutoModelForCTC", _speech)
SPECTROGRAMS = Task("classes of spectrograms", "AutoModelForAudioClassification", _spectrograms)

"""The embedded corpus as bytes, for language models whose vocabulary is bytes."""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from hf_chts.data.embedded import embedded_documents

EOS = 256  # ends a document
VOCABULARY = 257
_BATCH = 32  # windows in a forward pass of an evaluation


class Windows(Dataset[dict[str, Tensor]]):
    """A text cut into windows, each of which begins with the last token of the one before it.

    So every token but the first is predicted once. Items are as models of transformers take them: `input_ids` and
    `labels`, the same int64 tensor of shape (context,).

    Args:
        tokens: uint16 (n,), the text.
        context: tokens of a window.
        most: take this many of the windows, spread evenly over the text; 0: all.

    Raises:
        ValueError: the text does not fill one window.
    """

    def __init__(self, tokens: np.ndarray, context: int, most: int = 0) -> None:
        count = (len(tokens) - 1) // (context - 1)
        if not count:
            raise ValueError(f"the text has {len(tokens)} tokens, fewer than a context of {context}: lower context")
        self.tokens, self.context = tokens, context
        taken = min(most, count) if most else count
        self.starts = np.arange(taken) * count // taken * (context - 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self.starts[index]
        window = torch.from_numpy(self.tokens[start : start + self.context].astype(np.int64))
        return {"input_ids": window, "labels": window}


@lru_cache(3)
def split_tokens(split: str) -> np.ndarray:
    """The documents of a split of the embedded corpus end to end, each followed by `EOS`: uint16 (n,).

    Raises as `embedded_documents` does.
    """
    parts: list[np.ndarray] = []
    for document in embedded_documents(split):
        parts += [np.frombuffer(document.text.encode(), np.uint8), np.array([EOS])]
    return np.concatenate(parts).astype(np.uint16)


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Windows, *, autocast: bool) -> float:
    """Bits of all predicted tokens, ends of documents included, for each predicted byte.

    Args:
        autocast: multiply in bfloat16, as training with autocast does.

    Returns:
        NaN or infinity if the model gives such numbers.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    nats, count = 0.0, 0
    for start in range(0, len(windows), _BATCH):
        rows = [windows[index]["input_ids"] for index in range(start, min(start + _BATCH, len(windows)))]
        tokens = torch.stack(rows).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        targets = tokens[:, 1:].flatten()
        nats += float(functional.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum"))
        count += int((targets != EOS).sum())
    model.train(training)
    return nats / count / math.log(2)

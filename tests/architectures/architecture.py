"""A row of the table of architectures: a tiny model, what it is trained on, and which of its layers become sparse."""

import itertools
import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tasks import Task
from transformers import PreTrainedModel, set_seed


@dataclass(frozen=True)
class Architecture:
    """
    Attributes:
        kind: the class of the model.
        settings: of its config.
        task: what it is trained on.
        sparse: the layers that are to be sparse, as `layers` reads them; empty where the model is only refused.
        tied: whether several layers share a weight, mostly the output layer and the input embeddings.
        target_modules: of the config with which it is trained; None: the default.
        refused: what the default is refused with, as a regular expression; None: it is not.
        note: what is particular about it, or why it is refused, in the words of docs/architectures.md.
        idle: a part of a layer's name, where such layers may have no part in a step, as experts without a token.
    """

    kind: type[PreTrainedModel]
    settings: dict[str, Any]
    task: Task
    sparse: str = ""
    tied: bool = False
    target_modules: list[str] | None = None
    refused: str | None = None
    note: str = ""
    idle: str | None = None

    def model(self, seed: int = 0, **changes: Any) -> PreTrainedModel:
        set_seed(seed)
        return self.kind(self.kind.config_class(**(self.settings | changes)))

    def expected(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the layers that are sparse, by name."""
        return layers(self.sparse)

    def batch(self, size: int, seed: int = 0) -> dict[str, Any]:
        """Inputs and labels of some examples."""
        return self.task.batch(size, torch.Generator().manual_seed(seed))

    @property
    def loader(self) -> Any:
        """The Auto class that loads it without hf_chts."""
        return getattr(transformers, self.task.auto)

    @property
    def is_encoder_decoder(self) -> bool:
        return self.task.auto == "AutoModelForSeq2SeqLM"


def layers(text: str) -> dict[str, tuple[int, int]]:
    """(out, in) by name, of lines `prefix: name … (out)x(in), name …`; {3} in a prefix stands for 0, 1 and 2."""
    found = {}
    for line in filter(str.strip, text.splitlines()):
        prefix, _, groups = line.strip().partition(": ")
        parts = [range(int(part)) if i % 2 else [part] for i, part in enumerate(re.split(r"\{(\d+)\}", prefix))]
        for group in groups.split(", "):
            *names, shape = group.split()
            out, inn = shape.split("x")
            for numbers in itertools.product(*parts):
                for name in names:
                    found[f"{''.join(map(str, numbers))}.{name}"] = (int(out), int(inn))
    return found


def outputs(model, batch):
    """All tensors that a model returns in evaluation."""
    with torch.no_grad():
        found = _flat(model.eval()(**batch))
    assert found
    return found


def _flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [tensor for part in parts for tensor in _flat(part)]


def close(first, second):
    """Whether two results of `outputs` are equal within some roundings.

    Weights from a file lie where the file has them, and MKL rounds products by how its operands lie in memory: on some
    processors (AMD's) equal weights then give other last bits.
    """
    return len(first) == len(second) and all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(first, second, strict=True)
    )


def same(first, second):
    """Whether two results of `outputs` are equal bit for bit."""
    return len(first) == len(second) and all(a.equal(b) for a, b in zip(first, second, strict=True))

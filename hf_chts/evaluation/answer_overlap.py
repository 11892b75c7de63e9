"""How far an answer agrees with another, as in SQuAD; and the module in which the harness looks for it.

The harness's ReCoRD (SuperGLUE) imports `transformers.data.metrics.squad_metrics`, which transformers 5 no longer has.
"""

import importlib.util
import re
import string
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_PLACE = "transformers.data.metrics"


def words(answer: str) -> list[str]:
    """The words of an answer without case, punctuation and articles."""
    kept = "".join(character for character in answer.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def compute_exact(gold: str, answer: str) -> int:
    """1 if the words of both are the same, else 0."""
    return int(words(gold) == words(answer))


def compute_f1(gold: str, answer: str) -> float:
    """Harmonic mean of the shares of each answer's words that are in the other; of empty ones, whether both are."""
    expected, given = words(gold), words(answer)
    if not expected or not given:
        return float(expected == given)
    return 2 * (Counter(expected) & Counter(given)).total() / (len(expected) + len(given))


@contextmanager
def squad_metrics_importable() -> Iterator[None]:
    """Within the context, the module that the harness imports is there: transformers' own, or else these scores."""
    if importlib.util.find_spec(_PLACE) is not None:
        yield
        return
    package, module = ModuleType(_PLACE), ModuleType(f"{_PLACE}.squad_metrics")
    vars(module).update(compute_exact=compute_exact, compute_f1=compute_f1)
    vars(package).update(squad_metrics=module, __path__=[])
    added = {package.__name__: package, module.__name__: module}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)

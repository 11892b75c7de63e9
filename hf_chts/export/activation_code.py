"""Models of which only the largest activations stay (AbsTopK) need this package's code: their exports are packed."""

from pathlib import Path

from hf_chts.config import CONFIG_NAME
from hf_chts.files.reading import read_json


def activations_of(directory: str | Path) -> float:
    """The share of activations that stays in the model of an export or checkpoint; 1 if all do."""
    path = Path(directory) / CONFIG_NAME
    share = read_json(path).get("activation_topk", 1.0) if path.is_file() else 1.0
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"{path} has activation_topk {share!r}; it is a number in (0, 1]: restore the file")
    return float(share)


def refuse_plain(share: float, instead: str) -> None:
    """Raises ValueError if a plain directory of a model would compute something else than the model.

    Args:
        share: of the activations that stays.
        instead: what to use in its place.
    """
    if share < 1:
        raise ValueError(
            f"activation_topk is {share}: without the code of hf_chts transformers would keep all activations of a "
            "plain directory, and compute something else. It refuses packed ones until hf_chts is imported: use "
            f"{instead}"
        )

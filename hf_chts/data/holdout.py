"""Documents set aside for validation when a corpus has no split of its own for it."""

import datasets
import numpy as np


def hold_out_fraction(
    documents: datasets.Dataset, fraction: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Train and validation documents, both in corpus order; `fraction` is held out, chosen by `seed`.

    Raises:
        ValueError: there are fewer than two documents.
    """
    total = len(documents)
    if total < 2:
        raise ValueError(
            f"The corpus has {total} document, so none can be held out for validation (a text file is one "
            "document): split it into several, or put train.* and validation.* files into a folder, set "
            "dataset to the folder and validation_split to 'validation'."
        )
    held_out = min(max(1, round(total * fraction)), total - 1)
    shuffled = np.random.default_rng(seed).permutation(total)
    # sorted, so that a corpus larger than memory is still read from one end to the other
    return documents.select(np.sort(shuffled[held_out:])), documents.select(np.sort(shuffled[:held_out]))

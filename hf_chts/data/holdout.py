"""Documents set aside for validation when a corpus has no split of its own for it."""

import datasets
import numpy as np

from hf_chts.data.packing import texts_of


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


def hold_out_first(
    documents: datasets.IterableDataset, count: int, text_column: str = "text"
) -> tuple[tuple[int, ...], datasets.Dataset]:
    """How many of the first `count` documents of a stream come from each of its shards, and these documents.

    Per shard, because `IterableDataset.skip` leaves out other documents when dataloader workers share the
    shards.

    Raises:
        ValueError: the stream has no document left after these.
    """
    texts: list[str | None] = []
    taken = [0] * documents.num_shards
    for shard in range(documents.num_shards):
        for text in texts_of(documents.shard(num_shards=documents.num_shards, index=shard), text_column):
            if len(texts) == count:
                return tuple(taken), datasets.Dataset.from_dict({text_column: texts})
            texts.append(text)
            taken[shard] += 1
    raise ValueError(
        f"The corpus has {len(texts)} documents, and validation_documents={count} would hold out all of "
        "them: lower it, or set validation_split."
    )

"""One rank of a stream without a model: takes batches, and writes their digests and, on the way, its state.

stream_worker.py FOLDER RANK resumes it in a process of its own.
"""

import hashlib
import json
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from hf_chts.data import BlockStream, Shuffle, load_source

BATCHES, STOP, RANKS, WORKERS = 200, 77, 2, 2


def take_batches(folder: Path, rank: int, resumed: bool) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "letters")
    stream = BlockStream(load_source(str(folder / "corpus")), tokenizer, 16, shuffle=Shuffle(20, 7))
    loader = stream.loader(rank=rank, ranks=RANKS, batch_size=3, workers=WORKERS)
    state, taken = folder / f"state-{rank}.json", 0
    if resumed:
        loader.load_state_dict(json.loads(state.read_text()))
        taken = STOP
    digests = []
    for batch in loader:
        digests.append(hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest())
        taken += 1
        if taken == STOP:
            state.write_text(json.dumps(loader.state_dict()))
        if taken == BATCHES:
            break
    (folder / f"{'resumed' if resumed else 'unbroken'}-{rank}.json").write_text(json.dumps(digests))


if __name__ == "__main__":
    take_batches(Path(sys.argv[1]), int(sys.argv[2]), resumed=True)

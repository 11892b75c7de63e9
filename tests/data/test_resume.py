"""A stream's batches, with worker processes, stopped anywhere and taken up again: the very same ones."""

import gc
import gzip
import json
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stream_worker import BATCHES, RANKS, STOP, take_batches

from hf_chts.data import BlockStream, FileSource, Shuffle, load_source
from hf_chts.data.formats import DataFile

UNEVEN = (101, 7, 260)


def documents(file, count):
    return [f"file {file} row {row} " * (1 + row * 7 % 5) for row in range(count)]


def write_corpus(folder, ending, counts=UNEVEN, bad=()):
    """Files of so many documents; JSON lines also have bad documents after these rows."""
    folder.mkdir()
    for file, count in enumerate(counts):
        path = folder / f"train-{file:05}-of-{len(counts):05}.{ending}"
        if ending == "parquet":
            pq.write_table(pa.table({"text": documents(file, count)}), path, row_group_size=20)
        else:
            rows = [json.dumps({"text": text}) for text in documents(file, count)]
            rows = [f'{row}\n{{"text": 4}}\n' if number in bad else f"{row}\n" for number, row in enumerate(rows)]
            lines = "".join(rows).encode()
            path.write_bytes(gzip.compress(lines) if ending.endswith("gz") else lines)
    return folder


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", "parquet")


def stream_of(corpus, tokenizer, buffer=20, seed=7, packing="packed", block_size=16):
    return BlockStream(load_source(str(corpus)), tokenizer, block_size, packing, shuffle=Shuffle(buffer, seed))


def take(batches, count):
    return [batch["input_ids"].tolist() for batch in islice(batches, count)]


@pytest.mark.distributed
def test_two_ranks_of_two_workers_stopped_and_resumed_in_new_processes(corpus, letters):
    folder = corpus.parent
    letters.save_pretrained(folder / "letters")
    for rank in range(RANKS):
        take_batches(folder, rank, resumed=False)
    command = [sys.executable, str(Path(__file__).with_name("stream_worker.py")), str(folder)]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(RANKS)]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * RANKS, "\n".join(errors)
    unbroken, resumed = (
        [json.loads((folder / f"{run}-{rank}.json").read_text()) for rank in range(RANKS)]
        for run in ("unbroken", "resumed")
    )
    # equally many steps on every rank, of a corpus that cannot be shared evenly
    assert [len(digests) for digests in unbroken] == [BATCHES] * RANKS
    assert resumed == [digests[STOP:] for digests in unbroken]
    everything = [digest for digests in unbroken for digest in digests]
    assert len(set(everything)) >= 0.95 * len(everything)  # a few are the same again in the second epoch


@pytest.mark.parametrize(("ending", "packing"), [("json.gz", "packed"), ("jsonl", "truncate_and_pad")])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_anywhere(tmp_path, letters, ending, packing, workers):
    """The same batches, states and counts of bad documents, in later epochs too."""
    counts = (31, 2, 56) if packing == "packed" else (101, 7, 150)
    stream = stream_of(write_corpus(tmp_path / "corpus", ending, counts, bad=(1, 20, 30)), letters, packing=packing)
    loader = stream.loader(rank=1, ranks=2, batch_size=2, workers=workers)
    states, seen, skipped = [loader.state_dict()], [], [0]
    for batch in islice(loader, 120):
        seen.append(batch["input_ids"].tolist())
        states.append(json.loads(json.dumps(loader.state_dict())))
        skipped.append(loader.skipped)
    assert states[-1]["readers"][0]["place"]["epoch"] >= 1
    assert skipped == sorted(skipped)
    assert skipped[-1] >= 4
    for stop in (0, 1, 2, 60, 61, 119) if workers else range(0, 120, 7):
        again = stream.loader(rank=1, ranks=2, batch_size=2, workers=workers)
        again.load_state_dict(states[stop])
        assert again.skipped == skipped[stop]
        for taken, batch in enumerate(islice(again, min(120 - stop, 20)), stop):
            assert batch["input_ids"].tolist() == seen[taken]
            assert again.state_dict() == states[taken + 1]


def test_another_batch_size_goes_on_with_the_same_blocks(corpus, letters):
    stream = stream_of(corpus, letters)
    blocks = [row for batch in take(stream.loader(batch_size=1), 60) for row in batch]
    loader = stream.loader(batch_size=4)
    take(loader, 5)
    again = stream.loader(batch_size=7, workers=1)  # no worker and one are the same reader
    again.load_state_dict(loader.state_dict())
    assert [row for batch in take(again, 4) for row in batch] == blocks[20:48]


def test_an_epoch_over_ranks_and_workers_is_every_document_once(corpus, letters):
    """One document a block; the readers' first epochs together."""
    stream = stream_of(corpus, letters, packing="truncate_and_pad", block_size=120)
    found = Counter(
        letters.decode(block["input_ids"]).split("<|endoftext|>")[0]
        for reader in range(4)
        for block, _ in stream.read(reader, 4, epochs=1)
    )
    assert found == Counter(text for file, count in enumerate(UNEVEN) for text in documents(file, count))


def test_packed_blocks_of_an_epoch_are_its_documents_end_to_end(corpus, letters):
    stream = stream_of(corpus, letters, buffer=0)
    expected = [i for f, n in enumerate(UNEVEN) for t in documents(f, n) for i in [*letters(t)["input_ids"], 0]]
    whole = len(expected) // 16 * 16
    assert torch.cat([block["input_ids"] for block in stream]).tolist() == expected[:whole]
    # without end, the next epoch begins where the first one's last block does
    endless = [i for block, _ in islice(stream.read(), whole // 16 + 1) for i in block["input_ids"].tolist()]
    assert endless == (expected + expected)[: whole + 16]


def test_epochs_of_a_plain_dataloader_differ(corpus, letters):
    stream = stream_of(corpus, letters)
    first = [block["input_ids"].tolist() for block in stream]
    assert [block["input_ids"].tolist() for block in stream] == first
    stream.set_epoch(1)
    second = [block["input_ids"].tolist() for block in stream]
    assert second != first
    assert len(second) == len(first)


def test_a_resumed_reader_opens_no_file_before_its_window(corpus, letters, monkeypatch):
    opened = []
    read = DataFile.read
    monkeypatch.setattr(DataFile, "read", lambda self, *args: opened.append((self.name, args[3])) or read(self, *args))
    stream = stream_of(corpus, letters, buffer=10)
    loader = stream.loader(batch_size=2)
    take(loader, 150)
    state = loader.state_dict()
    place = state["readers"][0]["place"]
    assert place["piece"] >= 1
    assert place["position"] > 20  # inside of a file, beyond its first row group
    opened.clear()
    again = stream.loader(batch_size=2)
    again.load_state_dict(state)
    take(again, 1)
    assert opened[0][1] == place["position"]
    assert len(opened) == 1


def test_a_restart_is_another_order_that_resumes_too(corpus, letters):
    stream = stream_of(corpus, letters)
    first = take(stream.loader(workers=1), 20)
    loader = stream.loader(workers=1)
    loader.restart(9)
    restarted = take(loader, 20)
    assert restarted != first
    again = stream.loader(workers=1)
    again.load_state_dict(loader.state_dict())
    loader = stream.loader(workers=1)
    loader.restart(9)
    assert take(loader, 30)[20:] == take(again, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 3}, r"2 ranks with 2 dataloader workers each, and now there are 3 ranks with 2: use the same"),
        ({"workers": 1}, r"2 ranks with 2 .* and now there are 2 ranks with 1: .*ignore_data_skip"),
        ({"rank": 0}, "the state of rank 1, not of rank 0"),
        ({"seed": 8}, "seed: 7 there, 8 here"),
        ({"buffer": 21}, "shuffle_buffer: 20 there, 21 here"),
        ({"block_size": 17}, "block_size: 16 there, 17 here"),
        ({"packing": "truncate_and_pad"}, "packing: packed there, truncate_and_pad here"),
        ({"keep": str.isprintable}, "documents: all there"),
        ({"tokenizer": "bpe"}, "tokenizer: "),
        ({"corpus": "one more"}, "files: 3 there, 4 here"),
        ({"corpus": "renamed"}, "names and sizes"),
        ({"corpus": "longer"}, "bytes: "),
    ],
)
def test_another_stream_is_refused(corpus, letters, bpe, change, message):
    state = stream_of(corpus, letters).loader(rank=1, ranks=2, workers=2).state_dict()
    last = corpus / "train-00002-of-00003.parquet"
    match change.get("corpus"):
        case "one more":
            (corpus / "train-00003-of-00004.parquet").write_bytes(last.read_bytes())
        case "renamed":
            last.rename(corpus / "train-00009-of-00003.parquet")
        case "longer":
            pq.write_table(pa.table({"text": documents(2, 261)}), last, row_group_size=20)
    readers = {name: change.get(name, value) for name, value in (("rank", 1), ("ranks", 2), ("workers", 2))}
    stream = BlockStream(
        load_source(str(corpus)),
        bpe if "tokenizer" in change else letters,
        change.get("block_size", 16),
        change.get("packing", "packed"),
        shuffle=Shuffle(change.get("buffer", 20), change.get("seed", 7)),
        keep=change.get("keep"),
    )
    loader = stream.loader(**readers)
    before = loader.state_dict()
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict(state)
    assert loader.state_dict() == before


def test_a_moved_folder_is_the_same_corpus(corpus, letters, tmp_path):
    loader = stream_of(corpus, letters).loader()
    take(loader, 30)
    corpus.rename(tmp_path / "elsewhere")
    again = stream_of(tmp_path / "elsewhere", letters).loader()
    again.load_state_dict(loader.state_dict())
    assert take(again, 5) == take(stream_of(tmp_path / "elsewhere", letters).loader(), 35)[30:]


def test_a_file_that_is_damaged_is_named_by_the_worker_that_reads_it(corpus, letters, monkeypatch):
    # torch waits for so many seconds for each worker after an error
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    source = load_source(str(corpus))
    assert isinstance(source, FileSource)
    last = corpus / "train-00002-of-00003.parquet"
    last.write_bytes(last.read_bytes()[:300])
    loader = BlockStream(source, letters, 16, shuffle=Shuffle(1000, 0)).loader(workers=2)
    with pytest.raises(ValueError, match=f"{last} could not be read"):
        take(loader, 200)
    gc.collect()  # the workers' end, before the interval is as it was

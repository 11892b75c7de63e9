"""Map-style, streamed and prepared data: the same documents of the same files, and the same ones held out, refused or
skipped, each by a rule worked out here."""

import gzip
import io
import json
import logging
import re
import tarfile
from collections import Counter
from hashlib import blake2b
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import write_file, zstd

from hf_chts.data import BlockStream, DataArguments, Shuffle, load_data, load_source, load_tokenizer
from hf_chts.data.bad_documents import BadDocument
from hf_chts.data.loading import load_corpus
from hf_chts.data.packing import encode
from hf_chts.data.token_preparation import prepare_tokens

ROUTES = ["map", "stream", "prepare"]
every_route = pytest.mark.parametrize("route", ROUTES)


@pytest.fixture(scope="module")
def tokenizer(letters, tmp_path_factory):
    """A directory with a token per byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters.save_pretrained(folder)
    return folder


class Route:
    """What one route makes of a corpus, with one document in each block."""

    def __init__(self, route, tokenizer, out, seed=0, **settings):
        settings = {"tokenizer": str(tokenizer), "packing": "truncate_and_pad", "block_size": 128, **settings}
        args = DataArguments(**settings, max_eval_tokens=None, streaming=route == "stream", shuffle_buffer=7)
        if route == "prepare":
            self.index = prepare_tokens(
                load_corpus(args, seed),
                load_tokenizer(str(tokenizer), 257),
                out,
                tokenizer_name="letters",
                on_bad_document=args.on_bad_document or "error",
                workers=1,
            )
            args = DataArguments(**settings | {"dataset": str(out)}, max_eval_tokens=None)
        data = load_data(args, vocab_size=257, seed=seed)
        self.tokenizer, self.train_blocks = data.tokenizer, data.train
        self.validation = self.texts(data.validation)

    def texts(self, blocks):
        return [self.tokenizer.decode(block["input_ids"]).partition("<|endoftext|>")[0] for block in blocks]

    def train(self, readers=1):
        """The documents of an epoch, read by so many readers together, and how many they have skipped."""
        if not isinstance(self.train_blocks, BlockStream):
            return self.texts(self.train_blocks), None
        read = [list(self.train_blocks.read(reader, readers, epochs=1)) for reader in range(readers)]
        skipped = sum(blocks[-1][1].skipped for blocks in read if blocks)
        return [text for blocks in read for text in self.texts(block for block, _ in blocks)], skipped


# --- held out ---

# one in ten twice, some empty; of two files
CORPUS = [f"document {i} ä" if i % 13 else "" for i in range(200)]
CORPUS += CORPUS[::10]


def held_out(text, seed, fraction):
    digest = blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64 < fraction


@pytest.mark.parametrize(("seed", "fraction"), [(0, 0.05), (3, 0.05), (42, 0.3)])
@every_route
def test_the_same_documents_are_held_out(tmp_path, tokenizer, route, seed, fraction):
    for name, texts in (("a.jsonl", CORPUS[:150]), ("b.jsonl", CORPUS[150:])):
        write_file(tmp_path / "corpus" / name, texts)
    made = Route(
        route, tokenizer, tmp_path / "out", seed, dataset=str(tmp_path / "corpus"), validation_fraction=fraction
    )
    texts = [text for text in CORPUS if text]
    expected = [text for text in texts if held_out(text, seed, fraction)]
    assert 3 < len(expected) < 100
    assert made.validation == expected  # in the corpus's order
    for readers in (1, 2, 6) if route == "stream" else (1,):
        assert Counter(made.train(readers)[0]) == Counter(texts) - Counter(expected)


@pytest.mark.parametrize(("fraction", "chosen", "other"), [(0.001, "None", "larger"), (0.999, "All", "smaller")])
@every_route
def test_a_corpus_of_which_all_or_nothing_is_held_out(tmp_path, tokenizer, route, fraction, chosen, other):
    texts = ["one", "two", "", "two"]
    assert {held_out(text, 0, fraction) for text in texts if text} == {fraction > 0.5}
    path = write_file(tmp_path / "c.jsonl", texts)
    with pytest.raises(
        ValueError, match=f"{chosen} of the corpus's 3 documents.* seed=0: .*{other} validation_fraction"
    ):
        Route(route, tokenizer, tmp_path / "out", dataset=str(path), validation_fraction=fraction)
    assert not (tmp_path / "out/hf_chts_tokens.json").exists()


# --- formats ---

TEXTS = [f'{i}: ä€ "quoted", and\n\ta new line' * (1 + i % 2) for i in range(40)]


# test_formats.py has the others: the routes differ only in what they do with a document
@pytest.mark.parametrize("name", ["c.parquet", "c.jsonl.zst", "c.tar"])
@every_route
def test_the_same_documents_of_any_format(tmp_path, tokenizer, route, name):
    write_file(tmp_path / "corpus" / "train" / name, TEXTS)
    write_file(tmp_path / "corpus" / "validation" / name, TEXTS[:1])
    settings = {"dataset": str(tmp_path / "corpus"), "validation_split": "validation"}
    made = Route(route, tokenizer, tmp_path / "out", **settings)
    assert made.validation == TEXTS[:1]
    for readers in (1, 3) if route == "stream" else (1,):
        assert sorted(made.train(readers)[0]) == sorted(TEXTS)


# --- bad documents ---

BEFORE, AFTER = ["one", "two ä", "three"], ["five", "six"]
BAD_ROWS = {
    "a lone surrogate": rb'{"text": "a\ud83d"}',
    "half a pair the wrong way": rb'{"text": "a\ude00\ud83d"}',
    "no UTF-8": b'{"text": "caf\xe9"}',
    "a number": b'{"text": 4}',
    "a list": b'{"text": ["four"]}',
    "an object": b'{"text": {"text": "four"}}',
    "no column": b'{"content": "four"}',
    "no object": b'"four"',
}
BAD_LINES = {**BAD_ROWS, "no JSON": b'{"text": "four', "no JSON at all": b"\x00\x00\xff", "too deep": b"[" * 100_000}


def lines(bad, after=AFTER):
    good = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in (*BEFORE, *after)]
    return b"\n".join([*good[:3], bad, *good[3:]])


def separated(delimiter, bad, after=AFTER):
    good = [f'"{text}"{delimiter}1'.encode() for text in (*BEFORE, *after)]
    return b"\n".join([f"text{delimiter}id".encode(), *good[:3], bad, *good[3:]])


def arrow_text(*values):
    """Strings that Arrow has not looked at."""
    binary = pa.array(values, pa.binary())
    return pa.table({"text": pa.Array.from_buffers(pa.string(), len(values), binary.buffers())})


def parquet(*tables):
    file = io.BytesIO()
    with pq.ParquetWriter(file, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    return file.getvalue()


def ipc(table):
    file = io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return file.getvalue()


def tar(*members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


RAW = [text.encode() for text in (*BEFORE, "caf", *AFTER)]
RAW[3] += b"\xe9"
FOURTH_LINE = sum(len(json.dumps({"text": text}, ensure_ascii=False).encode()) + 1 for text in BEFORE)
STRINGS = arrow_text(*RAW)
# name of the case → name of the file, its contents, the place that is named
CASES = {
    **{f"lines, {damage}": ("c.jsonl", lines(bad), f"line at byte {FOURTH_LINE}") for damage, bad in BAD_LINES.items()},
    "lines, the last one cut": ("c.jsonl", lines(b'{"text": "fo', []), f"line at byte {FOURTH_LINE}"),
    **{f"gzip, {damage}": ("c.jsonl.gz", gzip.compress(lines(bad)), "line 4") for damage, bad in BAD_LINES.items()},
    "zstd, the last one cut": ("c.jsonl.zst", zstd(lines(b'{"text": "fo', [])), "line 4"),
    **{
        f"array, {damage}": ("c.json", b"[" + lines(bad).replace(b"\n", b",\n") + b"]", "row 4")
        for damage, bad in BAD_ROWS.items()
    },
    "Parquet, no UTF-8": ("c.parquet", parquet(STRINGS.slice(0, 2), STRINGS.slice(0, 0), STRINGS.slice(2)), "row 4"),
    "Parquet, a surrogate": ("c.parquet", parquet(arrow_text(*RAW[:3], b"a\xed\xa0\xbd", *RAW[4:])), "row 4"),
    "Arrow, no UTF-8": ("c.arrow", ipc(STRINGS), "row 4"),
    "CSV, no UTF-8": ("c.csv", b"id,text\n" + b"".join(b"1,%s\n" % text for text in RAW), "row 4"),
    "CSV, a field less": ("c.csv", separated(",", b"four"), "row 4"),
    "CSV, a stray quote": ("c.csv", separated(",", b'"fo" ur",1'), "row 4"),
    "CSV, a quote never closed": ("c.csv", separated(",", b'"fo', []), "row 4"),
    "TSV, a field more": ("c.tsv", separated("\t", b"fo\tur\t1"), "row 4"),
    "tar, no UTF-8": ("c.tar", tar(*[(f"{i}.txt", text) for i, text in enumerate(RAW)]), "sample 4"),
    "tar, no text": (
        "c.tar",
        tar(*[(f"{i}.{'cls' if i == 3 else 'txt'}", text) for i, text in enumerate(RAW)]),
        "sample 4",
    ),
}


def write_case(folder, case):
    """Write the file; returns it, the place that is named, and the good documents."""
    name, contents, place = CASES[case]
    folder.mkdir(parents=True)
    (folder / name).write_bytes(contents)
    good = BEFORE if "cut" in case or "never" in case else BEFORE + AFTER
    return folder / name, f"{folder / name}, .*{place}", good


@pytest.mark.parametrize("case", CASES)
def test_a_bad_document_is_named_and_the_others_are_read(tmp_path, case):
    file, place, good = write_case(tmp_path / "corpus", case)
    source = load_source(str(file), on_bad_document="skip")
    for parts in (1, 3):
        read = [text for part in range(parts) for text, _ in source.read(0, part, parts)]
        (bad,) = [text for text in read if isinstance(text, BadDocument)]
        assert sorted(text for text in read if isinstance(text, str)) == sorted(good)
        assert re.fullmatch(place, bad.place)


@pytest.mark.parametrize("case", ["lines, no column", "Parquet, no UTF-8", "CSV, a quote never closed"])
@every_route
def test_bad_documents(tmp_path, tokenizer, route, case, caplog):
    folder = tmp_path
    file, place, good = write_case(folder / "corpus/train", case)
    write_file(folder / "corpus/validation" / file.name, ["held out"])

    def run(policy):
        settings = {"dataset": str(folder / "corpus"), "validation_split": "validation", "on_bad_document": policy}
        made = Route(route, tokenizer, folder / f"out {policy}", **settings)
        trains = {readers: made.train(readers) for readers in ((1, 4) if route == "stream" else (1,))}
        return made, trains

    with pytest.raises(ValueError, match=f"{place}: .*on_bad_document: skip"):
        run("error")
    if route != "stream":
        with pytest.raises(ValueError, match=place):
            run(None)
    for policy in ("skip", None) if route == "stream" else ("skip",):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            made, trains = run(policy)
        assert [sorted(texts) for texts, _ in trains.values()] == [sorted(good)] * len(trains)
        assert trains[1][1] == (1 if route == "stream" else None)
        if route == "prepare":
            assert sum(shard.skipped for shards in made.index.splits.values() for shard in shards) == 1
        if policy == "skip":  # once a process
            told = [message for message in caplog.messages if f"{folder}/corpus/train/" in message]
            assert len(told) == 1
            assert told[0].endswith(": skipped")
        if route == "map":
            assert "1 of" in " ".join(caplog.messages)


@every_route
def test_a_bad_document_beyond_the_first_blocks(tmp_path, tokenizer, route, monkeypatch):
    monkeypatch.setattr(encode, "__defaults__", (50,))  # characters at a time
    write_file(tmp_path / "c/train/a.jsonl", TEXTS)
    (tmp_path / "c/train/b.jsonl").write_text('{"text": 4}')
    write_file(tmp_path / "c/validation/a.jsonl", ["x"])
    settings = {"dataset": str(tmp_path / "c"), "validation_split": "validation", "on_bad_document": "error"}
    with pytest.raises(ValueError, match=r"b.jsonl, the line at byte 0: column 'text' holds int"):
        Route(route, tokenizer, tmp_path / "out", **settings).train()


@pytest.mark.parametrize(
    ("name", "empty"), [("c.jsonl", b'{"text": null}\n{"text": ""}\n\n'), ("c.csv", b"text,id\n,1\n")]
)
@every_route
def test_rows_without_text_are_not_documents(tmp_path, tokenizer, route, name, empty):
    (tmp_path / "c/train").mkdir(parents=True)
    (tmp_path / "c/train" / name).write_bytes(write_file(tmp_path / name, TEXTS).read_bytes())
    (tmp_path / "c/train" / f"d{name}").write_bytes(empty)
    write_file(tmp_path / "c/validation" / name, ["x"])
    settings = {"dataset": str(tmp_path / "c"), "validation_split": "validation", "on_bad_document": "error"}
    made = Route(route, tokenizer, tmp_path / "out", **settings)
    assert sorted(made.train()[0]) == sorted(TEXTS)


# --- in the middle of training ---


def stream_of(path, tokenizer, on_bad_document=None, buffer=0):
    return BlockStream(
        load_source(str(path)), tokenizer, 16, shuffle=Shuffle(buffer, 5), on_bad_document=on_bad_document
    )


def corpus_with_bad_ones(path, total, bad):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ['{"text": 4}' if row in bad else json.dumps({"text": f"row {row}"}) for row in range(1, total + 1)]
    data = "".join(f"{row}\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize(
    ("total", "bad", "message"),
    [
        (300, range(10, 301, 10), "11 of the 110 documents .*line 110: column 'text' holds int"),
        (300, [*range(2, 13), 150], "12 of the 150 documents .*line 150: "),  # not before a hundred are read
        (99, range(50, 100), None),
        (300, range(291, 301), None),  # ten are few
        (1200, range(1190, 1201), None),  # eleven of 1,200 are less than one in a hundred
        (1000, range(990, 1001), "11 of the 1000 documents .*line 1000: "),
    ],
)
def test_bad_documents_are_skipped_until_they_are_many(tmp_path, letters, total, bad, message):
    path = corpus_with_bad_ones(tmp_path / "c.jsonl.gz", total, bad)
    good = [f"row {row}" for row in range(1, total + 1) if row not in bad]

    def run(policy):
        blocks = list(stream_of(path, letters, policy).read(epochs=1))
        return letters.decode([i for block, _ in blocks for i in block["input_ids"]]).split("<|endoftext|>"), blocks

    texts, blocks = run("skip")
    assert texts[: len(good) - 3] == good[: len(good) - 3]  # what does not fill a block is dropped
    assert blocks[-1][1].skipped == len(bad)
    if message is None:
        assert run(None)[0] == texts
    else:
        with pytest.raises(ValueError, match=message):
            run(None)
    with pytest.raises(ValueError, match=rf"line {bad[0]}: "):
        run("error")


def test_a_state_without_counts_still_loads(tmp_path, letters):
    """As in the first checkpoints."""
    stream = stream_of(write_file(tmp_path / "c.jsonl", TEXTS), letters, buffer=7)
    loader = stream.loader()
    blocks = [batch["input_ids"].tolist() for batch in islice(loader, 40)]
    loader = stream.loader()
    list(islice(loader, 25))
    state = json.loads(json.dumps(loader.state_dict()))
    for reader in state["readers"]:
        del reader["skipped"], reader["place"]["read"], reader["place"]["skipped"]
    again = stream.loader()
    again.load_state_dict(state)
    assert again.skipped == 0
    assert [batch["input_ids"].tolist() for batch in islice(again, 15)] == blocks[25:]

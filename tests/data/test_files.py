"""Files read in parts and from any position, against the rows that were written; and files that cannot be read."""

import gzip
import io
import json
from contextlib import contextmanager

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_chts.data import files
from hf_chts.data.corpora import load_source, local_files
from hf_chts.data.files import DataFile

# of very different lengths, some empty, some missing; line ends and multi-byte characters inside
TEXTS = [None if i % 11 == 5 else f"{i} ä€\n" * (i * 7 % 13) for i in range(53)]


def rows(texts):
    return [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)]


def write(path, texts=TEXTS):
    if path.suffix == ".parquet":
        table = pa.table({"id": list(range(len(texts))), "text": texts})
        pq.write_table(table, path, row_group_size=7, compression="none", write_page_checksum=True)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(rows(texts)).encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps([json.loads(row) for row in rows(texts)]))
    else:
        path.write_text("".join(rows(texts)).rstrip("\n") if len(texts) % 2 else "".join(rows(texts)))
    return path


def data_file(path, form=None):
    form = form or ("parquet" if path.suffix == ".parquet" else "json")
    return DataFile(str(path), path.name, path.stat().st_size, form)


FILES = ["c.parquet", "c.jsonl", "c.jsonl.gz", "c.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 20, 60])
def test_every_row_is_in_one_part(tmp_path, name, parts):
    file = data_file(write(tmp_path / name))
    read = [[text for text, _ in file.read("text", part, parts)] for part in range(parts)]
    if name.endswith(".gz"):  # the parts take turns
        assert read == [TEXTS[part::parts] for part in range(parts)]
    else:
        assert [text for part in read for text in part] == TEXTS
    if parts <= 7 and name != "c.jsonl":
        assert max(map(len, read)) - min(map(len, read)) <= 7  # a row group


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("part", "parts"), [(0, 1), (1, 3), (2, 3)])
def test_going_on_after_any_row(tmp_path, name, part, parts):
    file = data_file(write(tmp_path / name))
    whole = list(file.read("text", part, parts))
    assert len(whole) > 10
    for taken, (_, position) in enumerate(whole, 1):
        assert list(file.read("text", part, parts, position)) == whole[taken:]


@pytest.fixture
def bytes_read(monkeypatch):
    """How many bytes of the files' contents were read, as a list with one number."""
    count = [0]

    class Counting(io.BytesIO):
        def read(self, *args):
            data = super().read(*args)
            count[0] += len(data)
            return data

        def readline(self, *args):
            data = super().readline(*args)
            count[0] += len(data)
            return data

    @contextmanager
    def opened(self, decompress=True):
        with open(self.path, "rb") as file:
            yield Counting(file.read())

    monkeypatch.setattr(DataFile, "open", opened)
    return count


@pytest.mark.parametrize("name", ["c.parquet", "c.jsonl"])
def test_what_was_read_is_not_read_again(tmp_path, name, bytes_read):
    texts = [f"{i} " + "".join(chr(33 + (i * k) % 90) for k in range(20_000)) for i in range(70)]
    file = data_file(write(tmp_path / name, texts))
    whole = list(file.read("text"))
    assert [text for text, _ in whole] == texts
    everything, bytes_read[0] = bytes_read[0], 0
    assert [text for text, _ in file.read("text", start=whole[62][1])] == texts[63:]
    assert 0 < bytes_read[0] < 0.25 * everything  # 7 rows of 70, and some kB of a Parquet footer


def test_a_text_file_is_a_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\ntwo ä\n".encode())
    file = data_file(tmp_path / "a.txt", "text")
    assert list(file.read("text")) == [("one\ntwo ä\n", 1)]
    assert list(file.read("text", start=1)) == list(file.read("text", 1, 2)) == []


@pytest.mark.parametrize("name", FILES)
def test_no_rows(tmp_path, name):
    path = tmp_path / name
    if name == "c.parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    else:
        path.write_bytes({"c.jsonl": b"", "c.jsonl.gz": gzip.compress(b""), "c.json": b"[]"}[name])
    assert list(data_file(path).read("text")) == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def spoil(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20] = bytes(20)
    path.write_bytes(bytes(data))


def other_column(path):
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"content": ["a"]}), path)
    else:
        path.write_bytes(gzip.compress(b'{"content": "a"}\n') if path.suffix == ".gz" else b'{"content": "a"}\n')


def numbers(path):
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": [1]}), path)
    else:
        path.write_bytes(gzip.compress(b'{"text": 1}\n') if path.suffix == ".gz" else b'{"text": 1}\n')


@pytest.mark.parametrize("name", ["b.parquet", "b.jsonl", "b.jsonl.gz"])
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (cut, ValueError, "could not be read .*it is damaged or was not copied whole"),
        (spoil, ValueError, "could not be read .*it is damaged or was not copied whole"),
        (other_column, ValueError, "has no column 'text' .*It has content"),
        (numbers, ValueError, "holds int, not text"),
        (lambda path: path.unlink(), FileNotFoundError, "is not there any more"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, damage, error, message):
    texts = [f"{i} " + "".join(chr(33 + (i * k) % 90) for k in range(200)) for i in range(60)]
    path = write(tmp_path / name, texts)
    file = data_file(path)
    damage(path)
    with pytest.raises(error, match=rf"{path}:? .*{message}|{path}: .*{message}"):
        list(file.read("text"))


def test_rows_that_are_no_objects(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n"b"\n')
    with pytest.raises(ValueError, match=r"a.jsonl: a row is str, not an object .* after byte 14"):
        list(data_file(tmp_path / "a.jsonl").read("text"))


def test_folders_laid_out_as_on_the_hub(tmp_path):
    def names(folder, split, config=None):
        return [
            path.relative_to(tmp_path / folder).as_posix() for path in local_files(tmp_path / folder, split, config)
        ]

    for name in (
        "web/plain_text/train-00000-of-00002.parquet", "web/plain_text/train-00001-of-00002.parquet",
        "c4/en/c4-train.00000-of-00002.json.gz", "c4/en/c4-train.00001-of-00002.json.gz",
        "c4/en/c4-validation.00000-of-00001.json.gz", "c4/de/c4-train.00000-of-00001.json.gz",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    web = ["plain_text/train-00000-of-00002.parquet", "plain_text/train-00001-of-00002.parquet"]
    assert names("web", "train") == names("web", "train", "plain_text") == names("web", "train", "other") == web
    assert names("c4", "validation", "en") == ["en/c4-validation.00000-of-00001.json.gz"]
    assert len(names("c4", "train", "en")) == 2
    assert len(names("c4", "train")) == 3
    with pytest.raises(ValueError, match=r"has no split 'validation', only train"):
        local_files(tmp_path / "web", "validation")
    source = load_source(str(tmp_path / "c4"), "train", config="en")
    assert source.identity["files"] == 2
    write(tmp_path / "c4/en/more.json.gz")
    with pytest.raises(ValueError, match=r"that of .*more.json.gz does not: rename it"):
        local_files(tmp_path / "c4", "train", "en")


@pytest.mark.parametrize("name", FILES)
def test_a_remote_file_is_tried_again(tmp_path, name, monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/{name}", write(tmp_path / name).read_bytes())
    file = DataFile(f"memory://{name}", name, None, data_file(tmp_path / name).format)
    assert file.remote
    whole = list(file.read("text", 1, 2))
    waits = []
    monkeypatch.setattr(files.time, "sleep", waits.append)
    open_file, opened = DataFile.open, []

    class Failing(io.BytesIO):
        """Breaks off at its second half the first times that it is opened, and at once every third time."""

        def limit(self, size):
            if len(opened) < 5 and (len(opened) % 3 == 1 or self.tell() + max(size, 0) > 400):
                raise ConnectionError("the line was cut")

        def read(self, size=-1):
            self.limit(size)
            return super().read(size)

        def readline(self, size=-1):
            self.limit(0)
            return super().readline(size)

    @contextmanager
    def failing(self, decompress=True):
        with open_file(self, decompress) as good:
            opened.append(self.name)
            yield Failing(good.read())

    monkeypatch.setattr(DataFile, "open", failing)
    assert list(file.read("text", 1, 2)) == whole
    assert waits[0] == 2
    assert len(opened) == len(waits) + 1 >= 2
    opened.clear()
    monkeypatch.setattr(Failing, "limit", always_cut)
    with pytest.raises(ValueError, match=rf"memory://{name} could not be read .*the line was cut.* failed 6 times"):
        list(file.read("text"))


def always_cut(*args):
    raise ConnectionError("the line was cut")

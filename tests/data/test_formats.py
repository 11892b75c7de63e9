"""Files read in parts and from any position, against the rows that were written; and files that cannot be read."""

import io
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import COMPRESS, NAMES, form_of, json_rows, write_file

from hf_chts.data import formats
from hf_chts.data.bad_documents import BadDocument
from hf_chts.data.formats import DataFile, format_of

# of very different lengths, some empty, some missing; line ends and multi-byte characters inside
TEXTS = [None if i % 11 == 5 else f"{i} ä€\n" * (i * 7 % 13) for i in range(53)]


def write(path, texts=TEXTS):
    if path.name.endswith(".jsonl") and len(texts) % 2:
        path.write_text("\n".join(json_rows(texts)))  # no line end after the last one
        return path
    return write_file(path, texts)


def data_file(path):
    form = {"lines": "json", "feather": "arrow"}.get(form_of(path), form_of(path))
    assert format_of(path) == form
    return DataFile(str(path), path.name, path.stat().st_size, form)


def texts_in(path, texts=TEXTS):
    """Formats without null have empty texts instead."""
    return [text or "" for text in texts] if form_of(path) in ("csv", "tsv", "tar") else texts


def takes_turns(path):
    """Nobody can jump into it, so the parts take turns; JSON arrays are in memory whole."""
    return form_of(path) in ("csv", "tsv", "tar", "arrow", "feather") or (
        path.suffix in COMPRESS and form_of(path) == "lines"
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 20, 60])
def test_every_row_is_in_one_part(tmp_path, name, parts):
    file = data_file(write(tmp_path / name))
    read = [[text for text, _ in file.read("text", part, parts)] for part in range(parts)]
    texts = texts_in(tmp_path / name)
    if takes_turns(tmp_path / name):
        assert read == [texts[part::parts] for part in range(parts)]
    else:
        assert [text for part in read for text in part] == texts
    if parts <= 7 and name != "c.jsonl":
        assert max(map(len, read)) - min(map(len, read)) <= 7  # a row group


@pytest.mark.parametrize("name", NAMES)
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
    def opened(self):
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
    file = data_file(tmp_path / "a.txt")
    assert list(file.read("text")) == [("one\ntwo ä\n", 1)]
    assert list(file.read("text", start=1)) == list(file.read("text", 1, 2)) == []


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(tmp_path, name):
    assert list(data_file(write_file(tmp_path / name, [])).read("text")) == []
    data = b"" if form_of(tmp_path / name) in ("lines", "csv", "tsv") else None
    if data is not None:  # nothing at all, not even a header
        path = tmp_path / name
        path.write_bytes(COMPRESS[path.suffix](data) if path.suffix in COMPRESS else data)
        assert list(data_file(path).read("text")) == []


@pytest.mark.parametrize("groups", [[0, 3, 0, 0, 2, 0], [0], [2, 0], [0, 2]])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_row_groups_without_rows(tmp_path, groups, parts):
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        for group, rows in enumerate(groups):
            writer.write_table(pa.table({"text": [f"{group}.{row}" for row in range(rows)]}, schema=schema))
    file = data_file(tmp_path / "a.parquet")
    read = [text for part in range(parts) for text, _ in file.read("text", part, parts)]
    assert read == [f"{group}.{row}" for group, rows in enumerate(groups) for row in range(rows)]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20] = bytes(20)
    path.write_bytes(bytes(data))


def other_column(path):
    write_file(path, ["a"], column="content")


def remove(path):
    path.unlink()


DAMAGED = "could not be read.*it is damaged or was not copied completely"


def those(condition):
    return [name for name in NAMES if condition(Path(name))]


DAMAGES = [
    # lines and rows of plain text are documents each
    (cut, ValueError, DAMAGED, those(lambda path: path.name not in ("c.jsonl", "c.csv", "c.tsv"))),
    # what has checksums, or cannot have zeros in it
    (spoil, ValueError, DAMAGED, those(lambda p: p.name in ("c.parquet", "c.json") or p.suffix in COMPRESS)),
    (
        other_column,
        ValueError,
        "has no column 'text'.*It has id, content",
        those(lambda path: form_of(path) not in ("lines", "json", "tar")),
    ),
    (remove, FileNotFoundError, "does not exist any more", NAMES),
]


@pytest.mark.parametrize(
    ("name", "damage", "error", "message"), [(name, *case) for *case, names in DAMAGES for name in names]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, damage, error, message):
    texts = [f"{i} " + "".join(chr(65 + (i * i + i * k) % 57) for k in range(200)) for i in range(60)]
    path = write(tmp_path / name, texts)
    file = data_file(path)
    damage(path)
    with pytest.raises(error, match=rf"{path}:? .*{message}|{path} {message}"):
        list(file.read("text"))


def test_rows_that_are_not_objects(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n"b"\n{"text": "c"}\n')
    (one, _), (bad, at), (three, _) = data_file(tmp_path / "a.jsonl").read("text")
    assert (one, three, at) == ("a", "c", 18)
    assert isinstance(bad, BadDocument)
    assert bad.place == f"{tmp_path / 'a.jsonl'}, the line at byte 14"
    assert "a row is str, not an object" in bad.reason


@pytest.mark.parametrize("name", NAMES)
def test_a_remote_file_is_tried_again(tmp_path, name, monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/{name}", write(tmp_path / name).read_bytes())
    file = DataFile(f"memory://{name}", name, None, data_file(tmp_path / name).format)
    assert file.remote
    whole = list(file.read("text", 1, 2))
    waits = []
    monkeypatch.setattr(formats.time, "sleep", waits.append)
    open_file, opened = DataFile.open, []

    class Failing(io.BytesIO):
        """Breaks off at its second half the first times that it is opened, and at once every third time."""

        def limit(self, size):
            if len(opened) < 5 and (len(opened) % 3 == 1 or self.tell() + max(size, 0) > 400):
                raise ConnectionError("the line was cut")

        def read(self, size=-1):
            self.limit(size)
            return super().read(size)

        read1 = read

        def readline(self, size=-1):
            self.limit(0)
            return super().readline(size)

    @contextmanager
    def failing(self):
        with open_file(self) as good:
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

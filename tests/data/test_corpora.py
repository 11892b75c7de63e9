import gzip
import json

import datasets
import pytest

from hf_chts.data import load_documents
from hf_chts.data.corpora import local_files

TEXTS = ["The first document.\n\nIt has two paragraphs.", "Zweites: Grüße, 漢字.\n", "third"]


def write(path, texts=TEXTS, column="text"):
    """One file of documents in the format its name says; a text file has them as one."""
    rows = [{"id": index, column: text} for index, text in enumerate(texts)]
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(path)
        return path
    if name.endswith(".json"):
        content = json.dumps(rows)
    elif name.endswith(".jsonl"):
        content = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        content = "".join(texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def load(path, *args, **options):
    return [row[options.get("text_column", "text")] for row in load_documents(str(path), *args, **options)]


both = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])


@both
@pytest.mark.parametrize("name", ["c.jsonl", "c.json", "c.json.gz", "c.jsonl.gz", "c.parquet"])
def test_rows_are_documents(tmp_path, name, streaming):
    documents = load_documents(str(write(tmp_path / name)), streaming=streaming)
    assert isinstance(documents, datasets.IterableDataset if streaming else datasets.Dataset)
    assert [row["text"] for row in documents] == TEXTS


@both
@pytest.mark.parametrize("name", ["c.txt", "c.txt.gz"])
def test_a_text_file_is_one_document(tmp_path, name, streaming):
    assert load(write(tmp_path / name), streaming=streaming) == ["".join(TEXTS)]


@both
def test_folder_is_one_split(tmp_path, streaming):
    for name, text in zip(["b.txt", "a/z.txt.gz", "c.txt"], TEXTS, strict=True):
        write(tmp_path / name, [text])
    write(tmp_path / ".hidden" / "d.txt")
    write(tmp_path / "README.md")
    assert load(tmp_path, streaming=streaming) == [TEXTS[1], TEXTS[0], TEXTS[2]]  # by path


@both
def test_folder_of_splits(tmp_path, streaming):
    write(tmp_path / "train.jsonl", TEXTS[:1])
    write(tmp_path / "validation" / "a.jsonl", TEXTS[1:2])
    write(tmp_path / "test.jsonl.gz", TEXTS[2:])
    assert [load(tmp_path, split, streaming=streaming) for split in ("train", "validation", "test")] == [
        [text] for text in TEXTS
    ]
    with pytest.raises(ValueError, match=r"no split 'dev', only test, train, validation"):
        load(tmp_path, "dev", streaming=streaming)


def test_folder_without_train_is_not_of_splits(tmp_path):
    """A file is not left out because it happens to be called test."""
    files = [write(tmp_path / "notes.txt"), write(tmp_path / "test.txt")]
    assert local_files(tmp_path, "train") == files


@both
def test_other_column(tmp_path, streaming):
    path = write(tmp_path / "c.jsonl", column="content")
    assert load(path, text_column="content", streaming=streaming) == TEXTS


@both
@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_unknown_column(tmp_path, name, streaming):
    path = write(tmp_path / name, column="content")
    with pytest.raises(ValueError, match="no column 'text': set text_column to one of id, content"):
        load(path, streaming=streaming)


@both
def test_column_without_text(tmp_path, streaming):
    with pytest.raises(ValueError, match=r"'id' .* holds int, not text.*id, text"):
        load(write(tmp_path / "c.jsonl"), text_column="id", streaming=streaming)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/nowhere/at/all", "~/nowhere/at/all", "a/b/c"])
def test_missing_file(name):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist|'a/b/c' does not exist"):
        load_documents(name)


def test_unknown_ending(tmp_path):
    (tmp_path / "c.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"c\.csv has an unknown ending.*\.jsonl"):
        load(tmp_path / "c.csv")


def test_folder_without_documents(tmp_path):
    (tmp_path / "c.csv").write_text("a,b")
    with pytest.raises(FileNotFoundError, match=r"holds no files to read.*\.parquet"):
        load(tmp_path)


def test_mixed_formats(tmp_path):
    write(tmp_path / "a.txt")
    write(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match=r"several formats \(json, text\)"):
        load(tmp_path)


def test_split_of_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"one split, 'train', not 'validation'.*folder"):
        load(write(tmp_path / "c.jsonl"), "validation")


@both
@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_empty_corpus(tmp_path, name, streaming):
    if name == "c.jsonl":
        (tmp_path / name).write_text("")
    else:
        datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / name)
    with pytest.raises(ValueError, match=r"c\.\w+.* (holds no documents|could not be read)"):
        load(tmp_path / name, streaming=streaming)


@both
def test_broken_file(tmp_path, streaming):
    (tmp_path / "c.jsonl").write_text('{"text": "a"\n{{{')
    with pytest.raises(ValueError, match=r"c\.jsonl.* could not be read"):
        load(tmp_path / "c.jsonl", streaming=streaming)


@both
def test_text_that_is_not_utf8(tmp_path, streaming):
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"c\.txt.* could not be read.*UnicodeDecodeError"):
        load(tmp_path / "c.txt", streaming=streaming)


@both
def test_embedded(streaming):
    from hf_chts.data import embedded_documents

    assert load("embedded", "test", streaming=streaming) == [d.text for d in embedded_documents("test")]

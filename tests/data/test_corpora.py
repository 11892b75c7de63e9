"""Which files of a path are read, and as what."""

import json

import datasets
import pytest
from corpus_files import write_file

from hf_chts.data import embedded_documents, load_source
from hf_chts.data.corpora import find_files
from hf_chts.data.sources import texts_of_source

TEXTS = ["The first document.\n\nIt has two paragraphs.", "Zweites: Grüße, 漢字.\n", "third"]


def write(path, texts=TEXTS, column="text"):
    return write_file(path, texts, column)


def load(path, *args, **options):
    return list(texts_of_source(load_source(str(path), *args, **options)))


def test_what_is_a_document(tmp_path):
    assert load(write(tmp_path / "c.tsv.xz").rename(tmp_path / "c.TSV.XZ")) == TEXTS  # a row
    (tmp_path / "c.json").write_text(json.dumps(TEXTS))
    assert load(tmp_path / "c.json") == TEXTS  # a string of an array
    for name in ("c.txt", "c.text.bz2"):
        assert load(write(tmp_path / name)) == ["".join(TEXTS)]  # a text file


def test_long_fields_and_quotes_in_csv(tmp_path):
    texts = ["a" * 200_000, 'she said "no",\r\nand left', "\ufeffmark", "NA", "12"]
    assert load(write(tmp_path / "c.csv", texts)) == texts
    (tmp_path / "excel.csv").write_bytes(b"\xef\xbb\xbftext,id\r\nfirst,1\r\n\r\nsecond,2\r\n")
    assert load(tmp_path / "excel.csv") == ["first", "second"]


def test_folder_is_one_split(tmp_path):
    for name, text in zip(["b.txt", "a/z.txt.gz", "c.txt"], TEXTS, strict=True):
        write(tmp_path / name, [text])
    write(tmp_path / ".hidden" / "d.txt")
    (tmp_path / "README.md").write_text("# Three files")
    assert load(tmp_path) == [TEXTS[1], TEXTS[0], TEXTS[2]]  # by path


def test_folder_of_splits(tmp_path):
    write(tmp_path / "train.jsonl", TEXTS[:1])
    write(tmp_path / "validation" / "a.jsonl", TEXTS[1:2])
    write(tmp_path / "test.jsonl.gz", TEXTS[2:])
    assert [load(tmp_path, split) for split in ("train", "validation", "test")] == [[text] for text in TEXTS]


def test_folder_without_train_is_not_of_splits(tmp_path):
    """A file is not left out because it happens to be called test, or readme."""
    files = [write(tmp_path / "notes.txt"), write(tmp_path / "readme.txt"), write(tmp_path / "test.txt")]
    assert find_files(tmp_path, "train") == files


def test_folders_laid_out_as_on_the_hub(tmp_path):
    def names(folder, split, config=None):
        return [path.relative_to(tmp_path / folder).as_posix() for path in find_files(tmp_path / folder, split, config)]

    for name in (
        "web/plain_text/train-00000-of-00002.parquet", "web/plain_text/train-00001-of-00002.parquet",
        "c4/en/c4-train.00000-of-00002.json.gz", "c4/en/c4-train.00001-of-00002.json.gz",
        "c4/en/c4-validation.00000-of-00001.json.gz", "c4/de/c4-train.00000-of-00001.json.gz",
    ):  # fmt: skip
        write(tmp_path / name)
    (tmp_path / "web/dataset_infos.json").write_text("{}")
    web = ["plain_text/train-00000-of-00002.parquet", "plain_text/train-00001-of-00002.parquet"]
    assert names("web", "train") == names("web", "train", "plain_text") == names("web", "train", "other") == web
    assert names("c4", "validation", "en") == ["en/c4-validation.00000-of-00001.json.gz"]
    assert len(names("c4", "train")) == 3
    assert load_source(str(tmp_path / "c4"), "train", config="en").identity["files"] == 2
    write(tmp_path / "c4/en/more.json.gz")
    with pytest.raises(ValueError, match=r"more.json.gz does not: rename it"):
        find_files(tmp_path / "c4", "train", "en")


def saved(path, **options):
    """What `save_to_disk` writes, and the cache that `map` leaves beside it."""
    dataset = datasets.Dataset.from_dict({"text": [*TEXTS, None], "id": range(4)})
    dataset.save_to_disk(path, **options)
    datasets.load_from_disk(path).map(lambda row: {"text": "of a cache"})
    return path


def test_a_saved_dataset(tmp_path):
    saved(tmp_path / "one", num_shards=2)
    assert list((tmp_path / "one").glob("cache-*.arrow"))
    assert load(tmp_path / "one") == TEXTS
    source = load_source(str(tmp_path / "one"))
    assert source.num_shards == 2
    with pytest.raises(ValueError, match="no split 'test', only train"):
        load(tmp_path / "one", "test")
    # several side by side are splits
    (tmp_path / "two").mkdir()
    saved(tmp_path / "two/train")
    saved(tmp_path / "two/dev")
    assert load(tmp_path / "two", "dev") == load(tmp_path / "two") == TEXTS


def test_a_saved_dataset_dict(tmp_path):
    """Whatever its splits are called."""
    splits = {
        name: datasets.Dataset.from_dict({"text": [text]}) for name, text in zip(("en", "de", "x"), TEXTS, strict=True)
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "dict")
    assert [load(tmp_path / "dict", name) for name in splits] == [[text] for text in TEXTS]
    with pytest.raises(ValueError, match="no split 'train', only de, en, x"):
        load(tmp_path / "dict")


CARD = """---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: data/first*.jsonl
  - split: held_out
    path: data/second.jsonl
- config_name: de
  data_files: more/*.jsonl
---
# A corpus
"""


def clone(path, card):
    """A clone of a dataset on the Hub, with the other files that a repository has."""
    for name, text in zip(("data/first.jsonl", "data/second.jsonl", "more/third.jsonl"), TEXTS, strict=True):
        write(path / name, [text])
    (path / "README.md").write_text(card)
    (path / ".gitattributes").write_text("*.jsonl filter=lfs\n")
    (path / "dataset_infos.json").write_text('{"default": {"splits": {}}}')
    (path / "LICENSE.txt").write_text("Do as you like.")
    (path / ".git").mkdir()
    write(path / ".git/x.jsonl")
    return path


def test_a_clone_of_a_dataset_on_the_hub(tmp_path):
    path = clone(tmp_path / "clone", CARD)
    assert load(path, config="en") == TEXTS[:1]
    assert load(path, "held_out", config="en") == TEXTS[1:2]
    assert load(path, config="de") == TEXTS[2:]
    with pytest.raises(ValueError, match=r"no split 'test', only held_out, train"):
        load(path, "test", config="en")
    for config in (None, "fr"):
        with pytest.raises(ValueError, match=rf"{path}/README.md .*'en', 'de'.*dataset_config"):
            load(path, config=config)


@pytest.mark.parametrize("card", ["", "# No head", "---\nlicense: mit\ndataset_info:\n  splits: []\n---\n"])
def test_a_clone_whose_card_names_no_files(tmp_path, card):
    path = clone(tmp_path / "clone", card)
    assert load(path) == TEXTS
    for number, name in enumerate(("train", "test")):
        write(tmp_path / f"named/data/{name}-0000{number}-of-00002.parquet", [name])
    (tmp_path / "named/dataset_infos.json").write_text("{}")
    assert load(tmp_path / "named", "test") == ["test"]


def test_a_card_that_cannot_be_read(tmp_path):
    path = clone(tmp_path / "clone", "---\nconfigs: [\n---\n")
    with pytest.raises(ValueError, match=rf"{path}/README.md could not be read"):
        load(path)


def test_a_clone_without_its_large_files(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "c.parquet").write_text(pointer)
    with pytest.raises(ValueError, match=rf"{tmp_path}/c.parquet is a pointer of Git LFS.*git lfs pull"):
        load(tmp_path)


def test_other_column(tmp_path):
    assert load(write(tmp_path / "c.jsonl", column="content"), text_column="content") == TEXTS


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_unknown_column(tmp_path, name):
    path = write(tmp_path / name, column="content")
    with pytest.raises(ValueError, match="no column 'text'.* id, content"):
        load(path)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "~/nowhere/at/all", "nowhere/b/c"])
def test_missing_file(name):
    with pytest.raises(FileNotFoundError, match="nowhere.* does not exist"):
        load_source(name)


@pytest.mark.parametrize(
    ("names", "split", "error", "message"),
    [
        (["c.xml.gz"], "train", FileNotFoundError, r"holds no files to read.*\.parquet"),
        (["a.txt", "b.jsonl"], "train", ValueError, r"several formats \(json, text; such as a.txt, b.jsonl\)"),
        (["train.csv"], "dev", ValueError, "no split 'dev', only train"),
    ],
)
def test_folders_that_are_refused(tmp_path, names, split, error, message):
    for name in names:
        (tmp_path / name).write_text("a,b")
    with pytest.raises(error, match=message):
        load(tmp_path, split)


def test_files_that_are_refused(tmp_path):
    (tmp_path / "c.jsonl.zip").write_text("a,b")
    with pytest.raises(ValueError, match=r"c.jsonl.zip has an unknown ending.*\.jsonl"):
        load(tmp_path / "c.jsonl.zip")
    with pytest.raises(ValueError, match=r"one split, 'train', not 'validation'.*folder"):
        load(write(tmp_path / "c.jsonl"), "validation")
    for name in ("c.parquet", "c.tar"):
        for texts in ([], ["", ""]):
            with pytest.raises(ValueError, match=rf"{name}.* holds no documents"):
                load(write(tmp_path / name, texts))


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"c\.txt: a byte that is not UTF-8 \(0xE9\) at character 3"):
        load(tmp_path / "c.txt")
    with pytest.raises(ValueError, match=r"holds no documents, and 1 that cannot be read; the first is .*c\.txt"):
        load(tmp_path / "c.txt", on_bad_document="skip")


def test_embedded():
    assert load("embedded", "test") == [d.text for d in embedded_documents("test")]

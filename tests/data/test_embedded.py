import os
import sysconfig

import pytest

from hf_chts.data import SPLITS, Document, embedded, embedded_dataset, embedded_documents, embedded_tokenizer
from hf_chts.data.embedded import split_of, train_byte_level_bpe


@pytest.fixture(scope="module")
def splits():
    return {split: embedded_documents(split) for split in SPLITS}


def test_splits_are_disjoint(splits):
    paths = [document.path for documents in splits.values() for document in documents]
    assert len(paths) == len(set(paths))
    for split, documents in splits.items():
        assert documents == sorted(documents) == embedded_documents(split)
    size = {split: sum(len(document.text) for document in documents) for split, documents in splits.items()}
    total = sum(size.values())
    assert total > 5_000_000
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(paths)
    assert 0.85 < size["train"] / total < 0.95
    assert min(size["validation"], size["test"]) / total > 0.02


# sha256sum of the path, modulo 100 with bc: 14, 89, 90, 94, 95, 98
def test_split_of():
    splits = {"train": ("abc.py", "m120.py"), "validation": ("m156.py", "m59.py"), "test": ("m63.py", "m2.py")}
    for split, paths in splits.items():
        assert {split_of(path) for path in paths} == {split}


def test_what_is_left_out(tmp_path, monkeypatch):
    kept = {"zipfile.py": b"a", "json/decoder.py": "é\r\n".encode(), "unittest/case.py": b"b", "testing.py": b"c"}
    left_out = {
        "empty.py": b"",
        "blank.py": b" \n",
        "latin.py": b"caf\xe9",
        "notes.txt": b"d",
        "_sysconfigdata__linux_.py": b"e",
        "test/a.py": b"f",
        "tkinter/test/a.py": b"f",
        "lib2to3/tests/data/a.py": b"f",
        "idlelib/idle_test/a.py": b"f",
        "ctypes/x_tests/a.py": b"f",
        "config-3.11-x86_64/a.py": b"g",
        "site-packages/torch/a.py": b"h",
        "dist-packages/a.py": b"h",
        "json/__pycache__/a.py": b"i",
    }
    for name, content in (kept | left_out).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(embedded, "split_of", lambda path: "train")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert embedded_documents("train") == [Document(name, kept[name].decode()) for name in sorted(kept)]


def test_dataset(splits):
    dataset = embedded_dataset("test")
    assert dataset.column_names == ["path", "text"]
    assert [Document(**row) for row in dataset] == splits["test"]
    assert dataset._fingerprint == embedded_dataset("test")._fingerprint


def test_documents_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'dev'.*train, validation, test"):
        embedded_documents("dev")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no source files.*set dataset"):
        embedded_documents("train")


def test_tokenizer(bpe):
    assert len(bpe) == 512
    assert sorted(bpe.get_vocab().values()) == list(range(512))
    assert bpe.eos_token == bpe.pad_token == "<|endoftext|>"
    assert bpe.bos_token is None
    text = "def naïve(self):\n\treturn '漢字 🙂'  "
    encoded = bpe(text)
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert bpe.decode(encoded["input_ids"]) == text
    assert len(bpe("    return self")["input_ids"]) < len("    return self") / 2  # merges were learned


def test_tokenizer_is_trained_once(bpe, caches, monkeypatch, tmp_path):
    def refuse(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(embedded, "train_byte_level_bpe", refuse)
    assert embedded_tokenizer(512).get_vocab() == bpe.get_vocab()
    with pytest.raises(AssertionError, match="trained again"):  # another size is another tokenizer
        embedded_tokenizer(513)
    with pytest.raises(AssertionError, match="trained again"):
        embedded_tokenizer(512, cache_dir=tmp_path)
    monkeypatch.setattr(embedded, "embedded_documents", lambda split: [Document("a.py", "aaa")])
    with pytest.raises(AssertionError, match="trained again"):  # and so is another corpus
        embedded_tokenizer(512)
    assert all(path.name.startswith("tokenizer-") for path in (caches / "hf_chts").iterdir())


def test_two_processes_train_the_same_tokenizer(tmp_path, monkeypatch):
    """The other one finishes while this one is still training."""
    monkeypatch.setattr(embedded, "embedded_documents", lambda split: [Document("a.py", "abcd" * 9)])

    def train_second(texts, vocab_size):
        monkeypatch.setattr(embedded, "train_byte_level_bpe", train_byte_level_bpe)
        embedded_tokenizer(258, cache_dir=tmp_path)
        return train_byte_level_bpe(texts, vocab_size)

    monkeypatch.setattr(embedded, "train_byte_level_bpe", train_second)
    assert len(embedded_tokenizer(258, cache_dir=tmp_path)) == 258
    assert len(os.listdir(tmp_path)) == 1


def test_vocabulary_too_small_or_too_large():
    with pytest.raises(ValueError, match=r"vocab_size=256 .*257"):
        train_byte_level_bpe(["abc"], 256)
    # "abc" has two merges: ab, abc
    assert len(train_byte_level_bpe(["abc"], 259)) == 259
    with pytest.raises(ValueError, match=r"259 tokens, not vocab_size=300.*lower"):
        train_byte_level_bpe(["abc"], 300)

"""Blocks against ones put together by hand. Letters stand for their token, "." for EOS."""

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_chts.data import BlockStream, pack_blocks, packing, sources
from hf_chts.data.packing import pack, truncate_and_pad

TEXTS = ["abcde", "fg", "", None, "hijklmnopq", "xy"]
# abcde.fg.hijklmnopq.xy. is 23 tokens: five blocks of four, and "xy." is dropped
BLOCKS = ["abcd", "e.fg", ".hij", "klmn", "opq."]


def spell(example, letters):
    names = {index: name for name, index in letters.get_vocab().items()} | {letters.eos_token_id: "."}
    return "".join(names[int(index)] for index in example["input_ids"])


def spell_all(examples, letters):
    return [spell(example, letters) for example in examples]


def documents_of(texts, num_shards=None):
    """As a streaming dataset with so many shards, else a map-style one."""
    documents = datasets.Dataset.from_dict({"text": texts})
    return documents.to_iterable_dataset(num_shards=num_shards) if num_shards else documents


def test_pack():
    made = list(pack([("a", [1, 2, 3]), ("b", [4]), ("c", [5, 6, 7, 8, 9, 10, 11])], block_size=3))
    blocks = [block for block, _ in made]
    assert [block["input_ids"].tolist() for block in blocks] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert all(np.array_equal(block["input_ids"], block["labels"]) for block in blocks)
    # the document that each block ends in, and how much of it is used up
    assert [end for _, end in made] == [("a", 3), ("c", 2), ("c", 5)]


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 7])
def test_pack_goes_on_after_any_block(block_size):
    documents = [(name, list(range(10 * name, 10 * name + length))) for name, length in enumerate([4, 1, 9, 2, 6])]
    whole = [(block["input_ids"].tolist(), end) for block, end in pack(documents, block_size)]
    for taken, (_, (name, used)) in enumerate(whole, 1):
        rest = pack(documents[name:], block_size, skip=used)
        assert [(block["input_ids"].tolist(), end) for block, end in rest] == whole[taken:]


def test_truncate_and_pad():
    documents = [("a", [1, 2]), ("b", [3, 4, 5]), ("c", [6, 7, 8, 9])]
    short, exact, long = (block for block, _ in truncate_and_pad(documents, block_size=3, pad_token_id=0))
    assert {name: values.tolist() for name, values in short.items()} == {
        "input_ids": [1, 2, 0],
        "attention_mask": [1, 1, 0],
        "labels": [1, 2, -100],
    }
    assert exact["labels"].tolist() == exact["input_ids"].tolist() == [3, 4, 5]
    assert long["input_ids"].tolist() == [6, 7, 8]
    assert long["attention_mask"].tolist() == [1, 1, 1]
    whole = [end for _, end in truncate_and_pad(documents, block_size=3, pad_token_id=0)]
    for taken, (name, used) in enumerate(whole, 1):
        rest = truncate_and_pad(documents["abc".index(name) :], 3, 0, skip=used)
        assert [end for _, end in rest] == whole[taken:]


def test_map_style(letters):
    blocks = pack_blocks(documents_of(TEXTS), letters, 4)
    assert spell_all(blocks, letters) == BLOCKS
    assert set(blocks.column_names) == {"input_ids", "labels"}
    assert blocks[0]["input_ids"].dtype == torch.long
    assert torch.equal(blocks[3]["labels"], blocks[3]["input_ids"])


@pytest.mark.parametrize(("rows", "characters"), [(1, 1), (2, 3), (100, 10**6)])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_stream_equals_map_style(letters, monkeypatch, num_shards, rows, characters):
    monkeypatch.setattr(sources, "_READ_ROWS", rows)
    monkeypatch.setattr("hf_chts.data.stream._ENCODE_CHARACTERS", characters)
    stream = BlockStream(documents_of(TEXTS, num_shards), letters, 4)
    for _ in range(2):  # every iteration starts from the beginning
        assert spell_all(stream, letters) == BLOCKS
    assert next(iter(stream))["labels"].dtype == torch.long


def test_stream_workers_share_the_files(letters):
    """Three files of two documents; each of two workers reads one document of each file."""
    documents = documents_of(["abc", "def", "ghi", "jkl", "mno", "pqr"], num_shards=3)
    five = BlockStream(documents, letters, 5)
    loader = DataLoader(five, batch_size=None, num_workers=2)
    assert sorted(spell_all(loader, letters)) == sorted(["abc.g", "hi.mn", "def.j", "kl.pq"])
    assert spell_all(five, letters) == ["abc.d", "ef.gh", "i.jkl", ".mno."]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_keeps_only_what_belongs_to_it(letters, num_workers):
    documents = documents_of(["abc", "def", "ghi", "jkl", "mno", "pqr"], num_shards=3)
    stream = BlockStream(documents, letters, 4, keep=frozenset(["jkl", "mno", "pqr"]).__contains__)
    loader = DataLoader(stream, batch_size=None, num_workers=num_workers)
    assert sorted(spell_all(loader, letters)) == ["jkl.", "mno.", "pqr."]


def test_truncate_and_pad_documents(letters):
    blocks = pack_blocks(documents_of(TEXTS), letters, 4, "truncate_and_pad")
    # the pad token is the EOS token
    assert spell_all(blocks, letters) == ["abcd", "fg..", "hijk", "xy.."]
    assert blocks["attention_mask"][1].tolist() == [1, 1, 1, 0]
    assert blocks["labels"][1].tolist() == [*blocks[1]["input_ids"][:3].tolist(), -100]
    stream = BlockStream(documents_of(TEXTS, 1), letters, 4, "truncate_and_pad")
    for streamed, prepared in zip(stream, blocks, strict=True):
        assert streamed.keys() == prepared.keys()
        assert all(torch.equal(streamed[name], prepared[name]) for name in prepared)


def test_finite_part_of_a_stream_with_another_column(letters):
    documents = documents_of(TEXTS).rename_column("text", "content").to_iterable_dataset()
    blocks = pack_blocks(documents, letters, 4, text_column="content", max_blocks=2)
    assert isinstance(blocks, datasets.Dataset)
    assert spell_all(blocks, letters) == BLOCKS[:2]
    assert blocks[0]["labels"].dtype == torch.long


def test_prepared_once(letters, bpe, monkeypatch):
    """The cache answers for the same blocks, and for no others."""
    pack_blocks(documents_of(TEXTS), letters, 4)
    make = packing.blocks

    def make_one(*args):
        yield next(make(*args))
        raise RuntimeError("prepared again")

    monkeypatch.setattr(packing, "blocks", make_one)
    assert spell_all(pack_blocks(documents_of(TEXTS), letters, 4), letters) == BLOCKS
    for other in [
        lambda: pack_blocks(documents_of([*TEXTS, "z"]), letters, 4),
        lambda: pack_blocks(documents_of(TEXTS), bpe, 4),
        lambda: pack_blocks(documents_of(TEXTS), letters, 5),
        lambda: pack_blocks(documents_of(TEXTS), letters, 4, max_blocks=3),
    ]:
        with pytest.raises(datasets.exceptions.DatasetGenerationError):
            other()


@pytest.mark.parametrize("num_shards", [None, 1])
def test_what_cannot_be_packed(letters, tmp_path, num_shards):
    for texts, tokens in ((["abc", "de"], 7), (["", None], 0)):
        with pytest.raises(ValueError, match=f"My corpus holds {tokens} tokens.*block_size=8"):
            pack_blocks(documents_of(texts, num_shards), letters, 8, name="My corpus")
    assert len(pack_blocks(documents_of(["abc", "de"], num_shards), letters, 7)) == 1
    with pytest.raises(ValueError, match="packing='padded'"):
        packing.blocks(TEXTS, letters, 4, "padded")
    letters.save_pretrained(tmp_path)
    without = type(letters).from_pretrained(tmp_path, eos_token=None)
    with pytest.raises(ValueError, match="no eos_token"):
        BlockStream(documents_of(TEXTS, num_shards), without, 4)

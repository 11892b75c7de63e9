import json

import datasets
import pytest

import hf_chts.data
from hf_chts.data import BlockStream, DataArguments, corpora, embedded_dataset, embedded_documents, load_data
from hf_chts.data.holdout import Holdout


def corpus(folder, texts, name="c.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder / name)


@pytest.fixture
def saved(letters, tmp_path):
    letters.save_pretrained(tmp_path / "letters")
    return str(tmp_path / "letters")


def words(blocks, tokenizer):
    """The documents in blocks: those of these tests have exactly one each."""
    return [tokenizer.decode(block["input_ids"]).removesuffix("<|endoftext|>") for block in blocks]


@pytest.fixture
def ten_files(monkeypatch):
    """The embedded corpus cut to ten files a split, which is quicker."""
    monkeypatch.setattr(corpora, "embedded_dataset", lambda split: embedded_dataset(split).select(range(10)))


@pytest.mark.parametrize("streaming", [False, True])
def test_embedded(bpe, streaming, ten_files):
    data = load_data(DataArguments(block_size=128, streaming=streaming), vocab_size=512, seed=0)
    with pytest.warns(DeprecationWarning, match="LoadedData"):
        assert isinstance(data, hf_chts.data.PreparedData)
    assert isinstance(data.train, BlockStream if streaming else datasets.Dataset)
    assert isinstance(data.validation, datasets.Dataset)
    assert data.tokenizer.get_vocab() == bpe.get_vocab()
    # validation is the corpus's own split, from its first document on
    ids = [i for d in embedded_documents("validation")[:10] for i in [*bpe(d.text, verbose=False)["input_ids"], 0]]
    assert len(data.validation) == len(ids) // 128
    assert data.validation["input_ids"][:].flatten().tolist() == ids[: len(ids) // 128 * 128]
    firsts = [document.text[:40] for document in embedded_documents("train")[: 10 if streaming else 1]]
    assert bpe.decode(next(iter(data.train))["input_ids"])[:40] in firsts


def test_a_fraction_is_cached_by_seed(tmp_path, saved):
    args = DataArguments(
        dataset=corpus(tmp_path, [f"{i:03}" for i in range(100)]),
        tokenizer=saved,
        block_size=4,
        validation_fraction=0.1,
    )
    data, again, other = (load_data(args, vocab_size=257, seed=seed) for seed in (3, 3, 4))
    assert words(data.train, data.tokenizer) == sorted(words(data.train, data.tokenizer))
    assert again.train._fingerprint == data.train._fingerprint
    assert words(other.validation, data.tokenizer) != words(data.validation, data.tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_own_validation_split(tmp_path, saved, streaming):
    corpus(tmp_path / "c", ["abc", "def"], "train.jsonl")
    corpus(tmp_path / "c", [f"xyz{i}" for i in range(9)], "dev.jsonl")
    settings = {"dataset": str(tmp_path / "c"), "tokenizer": saved, "validation_split": "dev", "streaming": streaming}
    args = DataArguments(
        **settings, block_size=5, packing="truncate_and_pad", validation_fraction=0, max_eval_tokens=12
    )
    data = load_data(args, vocab_size=257, seed=0)
    assert sorted(text[:3] for text in words(data.train, data.tokenizer)) == ["abc", "def"]
    assert words(data.validation, data.tokenizer) == ["xyz0", "xyz1"]  # of max_eval_tokens
    with pytest.raises(ValueError, match=r"Split 'train'.* holds 8 tokens.*block_size=40"):
        load_data(DataArguments(**settings, block_size=40), vocab_size=257, seed=0)


def test_validation_part_shorter_than_a_block(tmp_path, saved):
    texts = [f"{i:02}" + "a" * 38 for i in range(20)]
    args = DataArguments(dataset=corpus(tmp_path, texts), tokenizer=saved, block_size=512, validation_fraction=0.2)
    held_out = sum(map(Holdout(0.2, 0), texts))
    assert 0 < held_out * 41 < 512
    with pytest.raises(ValueError, match=rf"The validation part of .* holds {held_out * 41} tokens"):
        load_data(args, vocab_size=257, seed=0)


def test_tokenizers_that_are_refused(tmp_path, saved):
    with pytest.raises(ValueError, match=r"257 tokens, more than the model's vocab_size=200.*to 257"):
        load_data(DataArguments(tokenizer=saved), vocab_size=200, seed=0)
    with pytest.raises(ValueError, match=r"nowhere.*could not be loaded"):
        load_data(DataArguments(tokenizer=str(tmp_path / "nowhere")), vocab_size=512, seed=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 1),
        ("block_size", "256"),
        ("packing", "pad"),
        ("validation_fraction", 0),
        ("validation_fraction", 1.0),
        ("validation_fraction", "half"),
        ("on_bad_document", "ignore"),
        ("shuffle_buffer", -1),
        ("shuffle_buffer", 1.5),
        ("max_eval_tokens", 255),
    ],
)
def test_arguments_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}|{field}={float(value) if value == 0 else value}"):
        DataArguments(**{field: value})
    assert DataArguments(validation_fraction="5e-3").validation_fraction == 0.005  # which YAML reads as a string

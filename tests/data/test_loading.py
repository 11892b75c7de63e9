import json

import datasets
import pytest
import yaml
from transformers import HfArgumentParser

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
    assert isinstance(data.train, BlockStream if streaming else datasets.Dataset)
    assert isinstance(data.validation, datasets.Dataset)
    assert data.tokenizer.get_vocab() == bpe.get_vocab()
    # validation is the corpus's own split, from its first document on
    ids = [i for d in embedded_documents("validation")[:10] for i in [*bpe(d.text, verbose=False)["input_ids"], 0]]
    assert len(data.validation) == len(ids) // 128
    assert data.validation["input_ids"][:].flatten().tolist() == ids[: len(ids) // 128 * 128]
    firsts = [document.text[:40] for document in embedded_documents("train")[: 10 if streaming else 1]]
    assert bpe.decode(next(iter(data.train))["input_ids"])[:40] in firsts


def test_max_eval_tokens(bpe, ten_files):
    data = load_data(DataArguments(block_size=128, max_eval_tokens=1000, streaming=True), vocab_size=512, seed=0)
    assert len(data.validation) == 7  # 1000 // 128


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


def test_without_a_fraction_where_there_is_a_split(tmp_path, saved):
    corpus(tmp_path / "c", ["abc"], "train.jsonl")
    corpus(tmp_path / "c", ["xyz"], "dev.jsonl")
    settings = {"dataset": str(tmp_path / "c"), "tokenizer": saved, "block_size": 4, "validation_split": "dev"}
    data = load_data(DataArguments(**settings, validation_fraction=0), vocab_size=257, seed=0)
    assert words(data.train, data.tokenizer) == ["abc"]


@pytest.mark.parametrize("streaming", [False, True])
def test_own_validation_split(tmp_path, saved, streaming):
    corpus(tmp_path / "c", ["abc", "def"], "train.jsonl")
    corpus(tmp_path / "c", ["xyz"], "dev.jsonl")
    args = DataArguments(
        dataset=str(tmp_path / "c"),
        tokenizer=saved,
        block_size=4,
        validation_split="dev",
        streaming=streaming,
    )
    data = load_data(args, vocab_size=257, seed=0)
    assert sorted(words(data.train, data.tokenizer)) == ["abc", "def"]
    assert words(data.validation, data.tokenizer) == ["xyz"]


@pytest.mark.parametrize("streaming", [False, True])
def test_training_part_shorter_than_a_block(tmp_path, saved, streaming):
    corpus(tmp_path / "c", ["abc", "def"], "train.jsonl")
    corpus(tmp_path / "c", ["x" * 100], "dev.jsonl")
    args = DataArguments(
        dataset=str(tmp_path / "c"),
        tokenizer=saved,
        block_size=50,
        validation_split="dev",
        streaming=streaming,
    )
    with pytest.raises(ValueError, match=r"Split 'train'.* holds 8 tokens.*block_size=50"):
        load_data(args, vocab_size=257, seed=0)


def test_validation_part_shorter_than_a_block(tmp_path, saved):
    texts = [f"{i:02}" + "a" * 38 for i in range(20)]
    args = DataArguments(dataset=corpus(tmp_path, texts), tokenizer=saved, block_size=512, validation_fraction=0.2)
    held_out = sum(map(Holdout(0.2, 0), texts))
    assert 0 < held_out * 41 < 512
    with pytest.raises(ValueError, match=rf"The validation part of .* holds {held_out * 41} tokens"):
        load_data(args, vocab_size=257, seed=0)


def test_tokenizer_larger_than_the_model(saved):
    with pytest.raises(ValueError, match=r"257 tokens, more than the model's vocab_size=200.*to 257"):
        load_data(DataArguments(tokenizer=saved), vocab_size=200, seed=0)


def test_tokenizer_that_is_not_there(tmp_path):
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


def test_arguments_from_yaml_and_command_line(tmp_path):
    # YAML reads 5e-3 as a string
    (tmp_path / "run.yaml").write_text("dataset: allenai/c4\nvalidation_fraction: 5e-3\nmax_eval_tokens: null\n")
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["validation_fraction"] == "5e-3"
    (args,) = HfArgumentParser(DataArguments).parse_yaml_file(str(tmp_path / "run.yaml"))
    assert (args.dataset, args.validation_fraction, args.max_eval_tokens) == ("allenai/c4", 0.005, None)
    command = ["--packing", "truncate_and_pad", "--streaming", "--dataset_config", "en", "--block_size", "64"]
    (args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(command)
    assert (args.packing, args.streaming, args.dataset_config, args.block_size) == (
        "truncate_and_pad",
        True,
        "en",
        64,
    )
    help_text = " ".join(HfArgumentParser(DataArguments).format_help().split())
    assert help_text.count("Default:") >= 9

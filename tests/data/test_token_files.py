"""Tokens prepared ahead: the same blocks as the corpus gives, of any size; damaged files; resumed preparation."""

import json
import pickle
import shutil

import datasets
import numpy as np
import pytest
import torch
import yaml
from cases import arguments, case_config, same_weights, weights
from test_resume import UNEVEN, documents, write_corpus
from tiny import tiny_llama
from torch.utils.data import DataLoader

from hf_chts import SparseTrainer
from hf_chts.__main__ import main
from hf_chts.data import DataArguments, load_data, pack_blocks, token_preparation
from hf_chts.data.holdout import Holdout
from hf_chts.data.loading import load_corpus
from hf_chts.data.token_files import TokenIndex
from hf_chts.data.token_preparation import prepare_tokens

TEXTS = [text for file, count in enumerate(UNEVEN) for text in documents(file, count)]


def prepare(corpus, tokenizer, out, workers=1, **changes):
    args = DataArguments(dataset=str(corpus), streaming=True, **changes)
    return prepare_tokens(load_corpus(args, 3), tokenizer, out, tokenizer_name="letters", workers=workers)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("c") / "corpus", "parquet")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, corpus, letters):
    folder = tmp_path_factory.mktemp("prepared")
    prepare(corpus, letters, folder / "tokens", validation_fraction=0.2)
    letters.save_pretrained(folder / "letters")
    return folder / "tokens"


def load(prepared, vocab_size=257, **changes):
    settings = {"tokenizer": str(prepared.parent / "letters"), "block_size": 16, "streaming": True, **changes}
    return load_data(DataArguments(dataset=str(prepared), **settings), vocab_size=vocab_size, seed=0)


def ids_of(texts, tokenizer):
    return [index for text in texts for index in [*tokenizer(text)["input_ids"], 0]]


@pytest.mark.parametrize("block_size", [7, 16, 1000])
def test_packed_blocks_of_any_size(prepared, letters, block_size):
    data = load(prepared, block_size=block_size)
    for part, rest in ((data.train, True), (data.validation, False)):
        expected = ids_of(filter(Holdout(0.2, 3, rest=rest), TEXTS), letters)
        assert len(part) == len(expected) // block_size
        found = torch.cat([part[i]["input_ids"] for i in range(len(part))]).tolist()
        assert found == expected[: len(part) * block_size]
        assert torch.equal(part[0]["labels"], part[0]["input_ids"])
        assert part[0]["input_ids"].dtype == torch.long
        with pytest.raises(IndexError):
            part[len(part)]


def test_a_document_a_block(prepared, letters):
    data = load(prepared, packing="truncate_and_pad", block_size=40)
    texts = list(filter(Holdout(0.2, 3, rest=True), TEXTS))
    expected = pack_blocks(datasets.Dataset.from_dict({"text": texts}), letters, 40, "truncate_and_pad")
    assert len(data.train) == len(texts) == len(expected)
    for made, block in zip((data.train[i] for i in range(len(texts))), expected, strict=True):
        assert made.keys() == block.keys()
        assert all(torch.equal(made[name], block[name]) for name in made)


def test_max_eval_tokens_and_workers(prepared):
    data = load(prepared, max_eval_tokens=100)
    assert len(data.validation) == 6
    alone = [block["input_ids"].tolist() for block in data.train]
    loader = DataLoader(pickle.loads(pickle.dumps(data.train)), batch_size=None, num_workers=2)
    assert [block["input_ids"].tolist() for block in loader] == alone


def test_bad_documents_are_refused_or_left_out_from_the_command_line(tmp_path, letters, capsys):
    """What was made before an error is kept; the number of skipped documents is in the index."""
    letters.save_pretrained(tmp_path / "letters")
    (tmp_path / "model.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 257}))
    (tmp_path / "c").mkdir()
    for file in range(20):
        rows = [json.dumps({"text": f"file {file} row {row}"}) for row in range(5)]
        if file in (7, 19):
            rows.insert(2, '{"text": "a\\ud83d"}')
        (tmp_path / f"c/{file:02}.jsonl").write_text("\n".join(rows))
    options = ["prepare", "--dataset", tmp_path / "c", "--out", tmp_path / "out", "--workers", 1]
    options += ["--tokenizer", tmp_path / "letters", "--model", tmp_path / "model.json"]
    with pytest.raises(SystemExit, match=r"07.jsonl, the line at byte 50: a lone surrogate.*on_bad_document"):
        main([str(option) for option in options])
    begun = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("train-*.tokens")}
    assert len(begun) == 7
    main([str(option) for option in [*options, "--on_bad_document", "skip"]])
    assert "1 bad documents skipped" in (shown := capsys.readouterr().out)
    held_out = sum(Holdout(0.05, 42)(f"file {file} row {row}") for file in range(20) for row in range(5))
    assert f"of {100 - held_out} documents; 2 that could not be read were skipped" in shown
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in begun} == begun
    index = TokenIndex.load(tmp_path / "out")
    assert [shard.skipped for shard in index.splits["train"]] == [int(file in (7, 19)) for file in range(20)]
    # the first indices had no counts
    path = tmp_path / "out/hf_chts_tokens.json"
    path.write_text(path.read_text().replace(',\n    "skipped": 0', ""))
    assert path.read_text().count("skipped") == 2
    assert TokenIndex.load(tmp_path / "out") == index


def test_by_several_processes_and_from_the_command_line(tmp_path, corpus, prepared, letters, capsys):
    (tmp_path / "model.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 257}))
    run = {"model": str(tmp_path / "model.json"), "dataset": "somewhere/else", "seed": 3, "learning_rate": 1e-3}
    run |= {"tokenizer": str(prepared.parent / "letters"), "validation_fraction": "2e-1", "max_eval_tokens": None}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    out = tmp_path / "again"
    options = ["--config", tmp_path / "run.yaml", "--dataset", corpus, "--out", out, "--workers", 2]
    main(["prepare", *map(str, options)])
    shown = capsys.readouterr().out
    held_out = sum(map(Holdout(0.2, 3), TEXTS))
    assert f"of {held_out} documents" in shown
    assert f"of {len(TEXTS) - held_out} documents" in shown
    one, two = (TokenIndex.load(directory) for directory in (prepared, out))
    assert one.splits == two.splits  # the checksums among them


def test_continued_after_an_interruption(tmp_path, corpus, letters, monkeypatch):
    out = tmp_path / "tokens"
    make, made = token_preparation.make_shard, []

    def make_some(job):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(job.number)
        return make(job)

    monkeypatch.setattr(token_preparation, "make_shard", make_some)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, letters, out)
    assert not (out / "hf_chts_tokens.json").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tokens")}
    assert len(before) == 10
    # what was written of a shard is not taken for a shard
    (out / ".train-00005.tokens.123").write_bytes(b"half")
    monkeypatch.setattr(token_preparation, "make_shard", make)
    index = prepare(corpus, letters, out)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    whole = prepare(corpus, letters, tmp_path / "whole")
    assert index.splits == whole.splits
    # a shard that has been damaged is found
    path = next(path for path in sorted(before) if path.stat().st_size)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match=f"{path} is damaged, its checksum differs"):
        prepare(corpus, letters, out)


def test_another_directory_is_refused(tmp_path, corpus, letters, bpe):
    out = tmp_path / "tokens"
    prepare(corpus, letters, out)
    for tokenizer, changes in ((bpe, {}), (letters, {"validation_fraction": 0.5})):
        with pytest.raises(FileExistsError, match="holds tokens of another corpus, split or tokenizer"):
            prepare(corpus, tokenizer, out, **changes)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty and does not hold prepared tokens"):
        prepare(corpus, letters, tmp_path / "other")


def first_tokens(directory):
    return next(path for path in sorted(directory.glob("train-*.tokens")) if path.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "changes", "error", "message"),
    [
        (lambda d: first_tokens(d).unlink(), {}, FileNotFoundError, r"train-.*tokens is missing: run prepare again"),
        (lambda d: first_tokens(d).write_bytes(b"ab"), {}, ValueError, r"train-.*tokens has 2 bytes and should have"),
        (lambda d: (d / "hf_chts_tokens.json").write_text("{}"), {}, ValueError, r"tokens.json cannot be used"),
        (lambda d: (d / "hf_chts_tokens.json").write_text("{"), {}, ValueError, r"tokens.json cannot be used"),
        (lambda d: None, {"tokenizer": "embedded", "vocab_size": 512}, ValueError, r"another tokenizer \(letters\)"),
        (lambda d: None, {"block_size": 10**6, "max_eval_tokens": None}, ValueError, r"fewer than one block"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, prepared, damage, changes, error, message):
    shutil.copytree(prepared.parent, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "tokens")
    with pytest.raises(error, match=message):
        load(tmp_path / "tokens", **changes)


def test_wide_tokens_for_a_large_vocabulary(tmp_path, corpus, letters, monkeypatch):
    monkeypatch.setattr(type(letters), "__len__", lambda self: 70_000)
    index = prepare(corpus, letters, tmp_path / "tokens")
    assert index.dtype == "<u4"
    tokens = np.concatenate([np.fromfile(p, "<u4") for p in sorted((tmp_path / "tokens").glob("train-*.tokens"))])
    assert tokens.tolist() == ids_of(filter(Holdout(0.05, 3, rest=True), TEXTS), letters)


def test_training_on_prepared_tokens_resumes_bit_for_bit(tmp_path, prepared):
    seen = {}

    class Recording(SparseTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.setdefault(self.args.output_dir, []).append(inputs["input_ids"].tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    def run(name, checkpoint=None):
        settings = {"max_steps": 9, "save_steps": 4, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2}
        trainer = Recording(
            model=tiny_llama(vocab_size=257),
            args=arguments(tmp_path / name, **settings),
            sparsity=case_config(update_interval=3),
            train_dataset=load(prepared).train,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return weights(trainer)

    assert same_weights(run("a"), run("b", str(tmp_path / "a/checkpoint-4")))
    assert seen[str(tmp_path / "b")] == seen[str(tmp_path / "a")][8:]

"""Study 2: sentence pairs, batches and scores worked out by hand, and runs that are cut off."""

import gzip
import math
import random
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_chts.studies import translation, translation_trainer
from hf_chts.studies.running import check, run_one
from hf_chts.studies.sentence_pairs import (
    DATA_VARIABLE,
    END,
    PAD,
    EncodedPairs,
    Vocabulary,
    batches,
    load_pairs,
    padded,
    shuffled_batches,
)
from hf_chts.studies.study import Run, Study
from hf_chts.studies.tasks import parsed
from hf_chts.studies.translation import Settings, bleu, curves_of, train
from hf_chts.studies.translation_trainer import TrainingBatches, inputs_of, loss_of, new_model, translate, whole_batch

ROOT = Path(__file__).parents[2]
ENGLISH = ["a man", "a woman", "two dogs", "the child", "sits", "runs", "sleeps", "in a park", "on a street", "there"]
GERMAN = ["ein Mann", "eine Frau", "zwei Hunde", "das Kind", "sitzt", "läuft", "schläft", "im Park", "auf der Straße"]
GERMAN += ["dort"]
PAIRS = EncodedPairs([[5, 6, 7, END], [8, END], [9, 10, END]], [[11, END], [12, 13, END], [14, 15, END]])
SMALL = {
    "data": "someone/multi30k", "vocabulary": 300, "width": 32, "feed_forward": 64, "layers": 1, "heads": 2,
    "tokens": 128, "steps": 12, "learning_rate": 3e-3, "warmup": 3, "update_warmup": 1, "evaluate_every": 4,
    "longest": 12,
}  # fmt: skip


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """The folder with 80, 12 and 6 made pairs, found by the variable."""
    folder = tmp_path / "data" / "multi30k"
    folder.mkdir(parents=True)
    draws = random.Random(0)
    for name, count in (("train", 80), ("val", 12), ("test_2016_flickr", 6)):
        chosen = [[draws.randrange(4), draws.randrange(4, 7), draws.randrange(7, 10)] for _ in range(count)]
        for language, words in (("en", ENGLISH), ("de", GERMAN)):
            lines = "".join(" ".join(words[number] for number in line).capitalize() + ".\n" for line in chosen)
            (folder / f"{name}.{language}.gz").write_bytes(gzip.compress(lines.encode()))
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def quiet(line):
    pass


def run(folder, seed=0, **settings):
    folder.mkdir(exist_ok=True)
    return Run("translation", "row", seed, SMALL | settings, folder)


def tiny_model():
    torch.manual_seed(0)
    return new_model(20, width=16, feed_forward=32, layers=1, heads=2, dropout=0.0)


def test_pairs_of_files(data):
    pairs = load_pairs("someone/multi30k")
    assert {split: len(found) for split, found in pairs.items()} == {"train": 80, "validation": 12, "test": 6}
    assert pairs == load_pairs(str(data))
    english, german = pairs["train"][0]
    assert english.endswith(".")
    assert [ENGLISH.index(word) for word in ENGLISH if word in english.lower()] == [
        GERMAN.index(word) for word in GERMAN if word.lower() in german.lower()
    ]


def test_pairs_that_are_not_there(data):
    (data / "val.de.gz").write_bytes(gzip.compress(b"one line\n"))
    with pytest.raises(ValueError, match="val.en.gz has 12 lines, and .de.gz has 1"):
        load_pairs("someone/multi30k")
    (data / "val.de.gz").unlink()
    with pytest.raises(FileNotFoundError, match="val.de.gz is missing"):
        load_pairs("someone/multi30k")
    with pytest.raises(FileNotFoundError, match=f"data is 'no/such'.*{DATA_VARIABLE}"):
        load_pairs("no/such")


def test_vocabulary_restores_texts_and_is_the_same_again(tmp_path):
    pairs = load_pairs("someone/multi30k")["train"]
    first = Vocabulary.of(pairs, 300, tmp_path / "a.json")
    Vocabulary.of(pairs, 300, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert len(first) <= 300
    texts = [german for _, german in pairs] + ["Ærø, niemals gesehen: 漢字!"]
    encoded = first.encode(texts)
    assert all(ids[-1] == END and PAD not in ids for ids in encoded)
    assert first.decode(encoded) == texts
    assert first.decode([[PAD, *encoded[0], PAD]]) == texts[:1]  # as a search gives it
    # what is in the file is taken, whatever size is asked for
    assert len(Vocabulary.of(pairs, 280, tmp_path / "a.json")) == len(first)


def test_batches_are_full():
    # longest first fill: 2, 3, 3 take 3·3 = 9 of 9; with 5 they would take 20
    assert batches([3, 5, 2, 3, 12, 4], 9) == [[2, 0, 3], [5], [1], [4]]
    assert batches([], 9) == []


def test_shuffled_batches_show_every_pair_once_an_epoch():
    lengths = [3, 5, 2, 3, 12, 4]
    made = list(islice(shuffled_batches(lengths, 9, seed=1), 8))
    for epoch in (made[:4], made[4:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(6))
    assert made == list(islice(shuffled_batches(lengths, 9, seed=1), 8))
    assert made != list(islice(shuffled_batches(lengths, 9, seed=2), 8))


def test_inputs():
    inputs = inputs_of(PAIRS, [0, 2])
    assert inputs["input_ids"].tolist() == [[5, 6, 7, END], [9, 10, END, PAD]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert inputs["labels"].tolist() == [[11, END, -100], [14, 15, END]]
    assert inputs["decoder_input_ids"].tolist() == [[PAD, 11, PAD], [PAD, 14, 15]]
    items = TrainingBatches(PAIRS, steps=5, tokens=8, seed=0)
    assert len(items) == 5
    for step in range(5):
        assert items[step]["input_ids"].dim() == 1
        expected = inputs_of(PAIRS, items.indices[step])
        found = whole_batch([items[step]])
        assert found.keys() == expected.keys()
        assert all(tensor.equal(expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_embeddings_are_shared_and_weights_are_glorots(norm):
    model = new_model(20, width=64, feed_forward=128, layers=1, heads=2, dropout=0.1, norm=norm)
    assert model.lm_head.weight is model.model.encoder.embed_tokens.weight
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    weight = model.model.encoder.layers[0].fc1.weight
    bound = math.sqrt(6 / (64 + 128))
    assert 0.95 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_where_norms_are(norm):
    """A layer that adds nothing leaves what it is given as it is where norms come before it, and scales it after."""
    model = new_model(20, width=64, feed_forward=128, layers=1, heads=2, dropout=0.0, norm=norm).eval()
    for side in (model.model.encoder, model.model.decoder):
        (layer,) = side.layers
        for name, linear in layer.named_modules():
            if name.endswith(("out_proj", "fc2")):
                nn.init.zeros_(linear.weight)
        given = 3 * torch.randn(2, 5, 64)
        mask = torch.zeros(2, 1, 5, 5)
        with torch.no_grad():
            found = layer(given, attention_mask=mask)
        found = found[0] if isinstance(found, tuple) else found
        if norm == "pre":
            assert found.equal(given)
            assert isinstance(side.layer_norm, nn.LayerNorm)
        else:
            torch.testing.assert_close(found, nn.functional.layer_norm(given, (64,)), rtol=1e-4, atol=1e-4)


def test_loss_is_the_mean_of_tokens():
    """Against pairs one at a time, without padding."""
    model = tiny_model().train()
    total, count = 0.0, 0
    for source, target in zip(PAIRS.source, PAIRS.target, strict=True):
        with torch.no_grad():
            logits = model(input_ids=padded([source]), decoder_input_ids=padded([[PAD, *target[:-1]]])).logits[0]
        total += float(nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum"))
        count += len(target)
    assert loss_of(model, PAIRS, tokens=8) == pytest.approx(total / count, rel=1e-5)
    assert model.training


def test_translations_come_in_the_order_of_their_sources():
    model = tiny_model().eval()
    together = translate(model, PAIRS.source, tokens=8, beams=2, longest=6)
    for source, found in zip(PAIRS.source, together, strict=True):
        (alone,) = translate(model, [source], tokens=8, beams=2, longest=6)
        assert [token for token in found if token != PAD] == [token for token in alone if token != PAD]


def test_bleu_by_hand():
    reference = "Ein Mann läuft im Park."
    assert bleu([reference], [reference]) == pytest.approx(100)
    # tokens: Ein Hund läuft im Park . of which 5 of 6, 3 of 5, 2 of 4, 1 of 3 n-grams are right
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert bleu(["Ein Hund läuft im Park."], [reference]) == pytest.approx(expected)
    assert bleu([reference.lower()], [reference]) < 60  # case counts


def test_curves_of_a_log():
    log = [
        {"step": 2, "loss": 6.0, "itop": 0.2, "active_neurons": 1.0, "sparsity": 0.5},
        {"step": 6, "loss": 3.0},
        {"step": 6, "eval_loss": 2.5, "seconds": 1.0, "processor_seconds": 1.0},
        {"step": 12, "loss": 1.0, "itop": 0.3, "active_neurons": 0.9, "sparsity": 0.9},
        {"step": 12, "eval_loss": 2.0},
        {"step": 12, "train_loss": 2.5},
    ]
    assert curves_of(log) == {
        "step": [6, 12], "loss_training": [4.0, 1.0], "loss_validation": [2.5, 2.0],
        "itop": [0.2, 0.3], "active_neurons": [1.0, 0.9], "sparsity": [0.5, 0.9],
    }  # fmt: skip
    dense = [{"step": 4, "loss": 3.0}, {"step": 4, "eval_loss": 2.5}]
    assert curves_of(dense) == {"step": [4], "loss_training": [3.0], "loss_validation": [2.5]}


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="steps is 10, and evaluate_every 4"):
        parsed(Settings, {"steps": 10, "evaluate_every": 4})
    with pytest.raises(ValueError, match="norm is 'before': it must be one of post, pre"):
        parsed(Settings, {"norm": "before"})


SPARSE = {"sparsity": 0.8, "drop_fraction": 0.3, "update_interval": 3}
CASES = {
    "dense": {"method": "dense"},
    "chtss": {"method": "chtss", **SPARSE},
    "gmp": {"method": "gmp", **SPARSE},
    "links": {"method": "chts", "storage": "links", "compute": "sparse", **SPARSE},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_is_cut_off_ends_as_one_that_is_not(tmp_path, monkeypatch, name):
    settings = {"sparsity": CASES[name], "norm": "pre" if name == "links" else "post"}
    whole = train(run(tmp_path / "whole", **settings), quiet)
    assert whole.curves["step"] == [4, 8, 12]
    assert ("itop" in whole.curves) == (name != "dense")
    assert whole.figures["loss_last"] == whole.curves["loss_validation"][-1]
    assert whole.figures["loss_best"] == whole.curves["loss_validation"][int(whole.figures["step_best"]) // 4 - 1]
    assert whole.figures["loss_last"] < whole.curves["loss_validation"][0]
    assert whole.processor_seconds > 0
    if name != "dense":
        possible = 3 * 4 * 32 * 32 + 4 * 32 * 64  # one layer of each side: four projections, and two of the decoder's
        assert whole.figures["links"] == pytest.approx(0.2 * possible, rel=0.01)
        assert whole.curves["sparsity"][-1] == pytest.approx(0.8, abs=1e-3)

    losses, evaluate = [], translation_trainer.loss_of

    def cut_off(*arguments):
        losses.append(evaluate(*arguments))
        if len(losses) == 2:
            raise KeyboardInterrupt
        return losses[-1]

    cut = run(tmp_path / "cut", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(translation_trainer, "loss_of", cut_off)
        with pytest.raises(KeyboardInterrupt):
            train(cut, quiet)
    assert (cut.folder / "training" / "checkpoint-4").is_dir()
    again = train(cut, quiet)
    assert again.curves == whole.curves
    assert again.figures == whole.figures
    # and once more where only the result was not written
    over = train(cut, quiet)
    assert over.figures == whole.figures
    assert over.seconds == again.seconds


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    train(run(tmp_path / "run", steps=4), quiet)
    with pytest.raises(ValueError, match="settings"):
        train(run(tmp_path / "run", steps=8), quiet)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    whole = train(run(tmp_path / "run", steps=4), quiet)
    state = tmp_path / "run" / "training" / "checkpoint-4" / "optimizer.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with pytest.raises(ValueError, match=rf"optimizer.pt .*Remove {tmp_path}/run to begin the run anew"):
        train(run(tmp_path / "run", steps=4), quiet)
    shutil.rmtree(tmp_path / "run")
    assert train(run(tmp_path / "run", steps=4), quiet).figures == whole.figures


@pytest.mark.parametrize("name", ["translation", "translation_short", "translation_prenorm"])
def test_the_studies(name):
    study = Study.load(ROOT / f"studies/{name}.yaml")
    check(study)
    # Table 2 at 90%
    papers = {
        "dense": (31.38,), "set": (29.73,), "rigl": (30.26,), "chts": (29.81,),
        "mest": (30.04,), "gmp": (30.49,), "granet": (31.62,), "chtss": (32.86,),
    }  # fmt: skip
    rows = ("dense", "set", "chts") if name == "translation_prenorm" else papers
    assert {row.name: row.paper for row in study.rows if row.paper} == {row: papers[row] for row in rows}
    assert all(row.settings["sparsity"]["method"] == row.name.split("_")[0] for row in study.rows)
    full = Study.load(ROOT / f"studies/{name}.yaml", quick=True)
    check(full)


def test_the_quick_form_of_the_study(tmp_path):
    study = Study.load(ROOT / "studies/translation.yaml", quick=True)
    chosen = next(run for run in study.runs(tmp_path / "scratch") if run.row == "chts")
    chosen.folder.mkdir(parents=True)
    result = run_one(study, chosen, "hf-chts study studies/translation.yaml --quick")
    assert set(translation.FIGURES) <= set(result["figures"])
    assert result["curves"]["step"] == [10, 20]
    assert result["figures"]["bleu_last"] >= 0

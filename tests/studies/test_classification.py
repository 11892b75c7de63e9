"""Study 1: data in MNIST's form, runs that are cut off, and what a run records."""

import gzip
import struct

import numpy as np
import pytest
import torch
from torch import nn

from hf_chts import SparsityConfig, sparsify
from hf_chts.studies import classification
from hf_chts.studies.classification import Settings, _accuracies, active, mlp, train
from hf_chts.studies.images import DATA_VARIABLE, load_images
from hf_chts.studies.study import Run
from hf_chts.studies.tasks import parsed

SPARSE = {
    "method": "chts", "sparsity": 0.9, "storage": "links", "initial_topology": "correlated", "update_until": 1.0,
    "removal": "relative_importance", "drop_fraction": 0.3, "drop_schedule": "constant", "initial_weights": "swi",
}  # fmt: skip
SMALL = {"data": "digits", "epochs": 6, "hidden": 64, "layers": 2, "checkpoint_epochs": 2}


def run(folder, seed=0, **settings):
    folder.mkdir(exist_ok=True)
    return Run("classification", "row", seed, {"sparsity": SPARSE} | SMALL | settings, folder)


def quiet(line):
    pass


@pytest.fixture
def idx(tmp_path, monkeypatch):
    """A folder with 100 and 20 random images of 28 by 28 in MNIST's files, and the arrays."""
    folder = tmp_path / "data" / "fashion_mnist"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 100), ("t10k", 20)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        arrays[split] = (images, labels)
        head = struct.pack(">4B3i", 0, 0, 8, 3, count, 28, 28)
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes()))
        head = struct.pack(">4Bi", 0, 0, 8, 1, count)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())  # packed or not
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    return arrays


def test_images_of_idx_files(idx):
    images = load_images("fashion_mnist")
    expected = (idx["train"][0].reshape(100, 784).astype(np.float64) / 255 - 0.2860) / 0.3530
    assert images.train.dtype == torch.float32
    assert np.abs(images.train.numpy() - expected).max() < 1e-5
    assert images.test.shape == (20, 784)
    assert images.train_labels.tolist() == [number % 10 for number in range(100)]
    assert images.classes == 10


def test_a_file_that_was_cut_off_is_named(idx, tmp_path):
    path = tmp_path / "data" / "fashion_mnist" / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(OSError, match="t10k-labels-idx1-ubyte is not a whole IDX file"):
        load_images("fashion_mnist")


@pytest.mark.parametrize(
    "contents",
    [
        b"ab",
        b"\0\0\x08\0X",  # no dimensions
        struct.pack(">4B3i", 0, 0, 8, 3, -1, 28, 28) + bytes(784),
        struct.pack(">4B3i", 0, 0, 8, 3, 0, 28, 28),
        struct.pack(">4Bi", 0, 0, 8, 1, 100) + bytes(100),  # labels
    ],
    ids=["short", "no dimensions", "negative", "empty", "labels"],
)
def test_a_file_of_something_else_is_named(idx, tmp_path, contents):
    (tmp_path / "data" / "fashion_mnist" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(contents))
    with pytest.raises(OSError, match="train-images-idx3-ubyte.gz is not a whole IDX file of bytes .*: fetch it again"):
        load_images("fashion_mnist")


@pytest.mark.parametrize("kept", [0, 5, -9])
def test_a_packed_file_that_was_cut_off_is_named(idx, tmp_path, kept):
    path = tmp_path / "data" / "fashion_mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(OSError, match="train-images-idx3-ubyte.gz is not a whole IDX file of bytes .*: fetch it again"):
        load_images("fashion_mnist")


def test_files_that_are_missing_or_do_not_fit_are_named(idx, tmp_path):
    folder = tmp_path / "data" / "fashion_mnist"
    labels = folder / "t10k-labels-idx1-ubyte"
    labels.write_bytes(struct.pack(">4Bi", 0, 0, 8, 1, 3) + bytes(3))
    with pytest.raises(OSError, match="fashion_mnist has 20 images and 3 labels of the test split: fetch them again"):
        load_images("fashion_mnist")
    labels.unlink()
    with pytest.raises(OSError, match="fashion_mnist lacks the labels of the test split: fetch t10k-labels-idx1-ubyte"):
        load_images("fashion_mnist")
    labels.write_bytes(struct.pack(">4Bi", 0, 0, 8, 1, 20) + bytes(20))
    images = folder / "t10k-images-idx3-ubyte.gz"
    images.write_bytes(gzip.compress(struct.pack(">4B3i", 0, 0, 8, 3, 20, 14, 14) + bytes(20 * 14 * 14)))
    with pytest.raises(OSError, match="fashion_mnist has images of 784 and of 196 pixels: fetch them again"):
        load_images("fashion_mnist")
    (folder / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(OSError, match="fashion_mnist lacks the images of the train split"):
        load_images("fashion_mnist")


def test_data_that_is_nowhere_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(OSError, match=rf"mnist is not in {tmp_path}/mnist, .* {DATA_VARIABLE}"):
        load_images("mnist")
    with pytest.raises(ValueError, match="unknown data 'fashionmnist'; did you mean 'fashion_mnist'"):
        load_images("fashionmnist")


def test_a_run_that_was_cut_off_gives_the_same_figures(tmp_path, monkeypatch):
    whole = train(run(tmp_path / "whole"), quiet)
    steps = classification._Trained.train_epoch
    calls = []

    def stops(self, seed):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(self.epoch)
        return steps(self, seed)

    monkeypatch.setattr(classification._Trained, "train_epoch", stops)
    with pytest.raises(KeyboardInterrupt):
        train(run(tmp_path / "cut"), quiet)
    monkeypatch.setattr(classification._Trained, "train_epoch", steps)
    said = []
    again = train(run(tmp_path / "cut"), said.append)
    assert said[0] == "goes on after epoch 4"
    assert again.figures == whole.figures
    assert again.curves == whole.curves
    assert whole.figures["accuracy_last"] > 80


def test_what_is_recorded_is_counted(tmp_path):
    outcome = train(run(tmp_path, held_out=200), quiet)
    curves, figures = outcome.curves, outcome.figures
    assert curves["epoch"] == [1, 2, 3, 4, 5, 6]
    assert figures["accuracy_best"] == max(curves["accuracy"])
    chosen = curves["held_out"].index(max(curves["held_out"]))
    assert figures["accuracy_chosen"] == curves["accuracy"][chosen]
    assert figures["links"] == round(64 * 64 * 0.1) + round(64 * 64 * 0.1)
    assert curves["itop"] == sorted(curves["itop"])
    assert 0.1 < curves["itop"][0] <= 0.14  # 30% of the links are new, or were there before
    assert outcome.seconds > 0


def test_a_dense_run_has_all_links(tmp_path):
    figures = train(run(tmp_path, epochs=1, sparsity={"method": "dense"}), quiet).figures
    assert (figures["links"], figures["sparsity"], figures["itop"]) == (64 * 64 * 2, 0.0, 1.0)


def test_the_rate_falls_to_its_end_and_stays(tmp_path):
    settings = parsed(Settings, {"data": "digits", "epochs": 10, "hidden": 32, "layers": 1, "sparsity": SPARSE})
    trained = classification._Trained(settings, load_images("digits"), 0)
    rate = trained.scheduler.lr_lambdas[0]
    end = int(0.9 * trained.max_steps)
    assert rate(0) * 0.025 == pytest.approx(0.025)
    assert rate(end // 2) * 0.025 == pytest.approx((0.025 + 2.5e-4) / 2, rel=1e-2)
    assert rate(end) * 0.025 == rate(trained.max_steps) * 0.025 == pytest.approx(2.5e-4)
    assert trained.sparse.config.update_interval == trained.per_epoch == 1438 // 32


def test_the_rate_rises_as_density_falls(tmp_path):
    sparse = {"method": "gmp", "sparsity": 0.9, "rate_by_density": "inverse_sqrt"}
    settings = parsed(Settings, {"data": "digits", "epochs": 4, "hidden": 32, "layers": 1, "sparsity": sparse})
    trained = classification._Trained(settings, load_images("digits"), 0)
    first, last = (trained.scheduler.lr_lambdas[0](step) for step in (0, trained.max_steps - 1))
    # from half of the links to a tenth: √10 in place of √2
    assert first == pytest.approx(2**0.5)
    assert last == pytest.approx(0.01 * 10**0.5, rel=1e-3)


def test_active_neurons_by_hand():
    model = mlp(3, 3, 2, 2)
    masks = {"0": torch.zeros(3, 3, dtype=torch.bool), "2": torch.zeros(3, 3, dtype=torch.bool)}
    # 0 → 1 → 2 is a path; neuron 0 of the middle has no output, and neuron 2 no input
    masks["0"][1, 0] = masks["0"][0, 1] = masks["2"][2, 1] = masks["2"][0, 2] = True
    sparse = sparsify(model, SparsityConfig("set", sparsity=7 / 9, target_modules=["0", "2"]), masks=masks)
    assert active(sparse) == pytest.approx(4 / 12)  # one input and one output of each layer
    assert isinstance(model[0], nn.Linear)


@pytest.mark.parametrize("damage", [b"", bytes(4), b"PK broken"])
def test_a_damaged_checkpoint_is_named_with_the_remedy(tmp_path, damage):
    tmp_path.joinpath("checkpoint.pt").write_bytes(damage)
    with pytest.raises(ValueError, match="checkpoint.pt cannot be used: .* Remove it to begin the run anew"):
        train(run(tmp_path, sparsity=SPARSE), quiet)


def test_a_checkpoint_with_one_changed_byte_is_named(tmp_path):
    """torch.load takes it without a word."""

    def stop(line):
        if line.startswith("epoch 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run(tmp_path, sparsity=SPARSE, epochs=3, checkpoint_epochs=1), stop)
    path = tmp_path / "checkpoint.pt"
    contents = bytearray(path.read_bytes())
    last = list(torch.load(path, weights_only=True)["model"].values())[-1]  # of the biases, which all are there
    contents[contents.index(last.numpy().tobytes())] ^= 1
    path.write_bytes(contents)
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match="its checksum does not match. Remove it to begin the run anew"):
        train(run(tmp_path, sparsity=SPARSE, epochs=3, checkpoint_epochs=1), quiet)


def test_a_folder_in_place_of_a_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint.pt").mkdir()
    with pytest.raises(ValueError, match="checkpoint.pt cannot be used: it is a folder. Remove it to begin the run"):
        train(run(tmp_path, sparsity=SPARSE), quiet)


def test_the_outcome_has_the_sparsity_that_the_run_had(tmp_path):
    outcome = train(run(tmp_path, sparsity=SPARSE), quiet)
    assert outcome.sparsity["target_modules"] == ["0", "2"]
    assert outcome.sparsity["update_interval"] > 1


def test_settings_that_are_wrong_are_named():
    with pytest.raises(ValueError, match="unknown setting 'epoch'; did you mean 'epochs'"):
        parsed(Settings, {"data": "digits", "epoch": 3})
    with pytest.raises(ValueError, match="setting epochs is 'many'; it must be of type int"):
        parsed(Settings, {"data": "digits", "epochs": "many"})
    with pytest.raises(ValueError, match="setting data is missing"):
        parsed(Settings, {})


def test_what_follows_from_other_settings_is_no_setting(tmp_path):
    for name, value in (("topology_seed", 3), ("update_interval", 5), ("target_modules", ["0"])):
        with pytest.raises(ValueError, match=f"sparsity has {name}, which follows"):
            train(run(tmp_path, sparsity={**SPARSE, name: value}), quiet)
    with pytest.raises(ValueError, match="unknown setting 'methd'; did you mean 'method'"):
        train(run(tmp_path, sparsity={"methd": "set"}), quiet)


def test_the_best_epoch_is_one_at_the_target_sparsity():
    curves = {
        "accuracy": [90.0, 88.0, 89.0, 87.0],
        "held_out": [91.0, 86.0, 85.0, 84.0],
        "sparsity": [0.9, 0.99, 0.99, 0.99],
    }
    assert _accuracies(curves) == {
        "accuracy_last": 87.0, "accuracy_best": 89.0, "epoch_best": 3.0, "accuracy_chosen": 88.0, "epoch_chosen": 2.0
    }  # fmt: skip

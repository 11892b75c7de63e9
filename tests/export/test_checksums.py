"""Checksums of both kinds of export: weights that a disk or a copy has changed are refused, and the file is named."""

import binascii
import json
import shutil

import pytest
import torch
from cases import trainer
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from hf_chts import SparsityConfig, export_sparse, load_sparse, sparsify
from hf_chts.export import pack_directory, push_directory, unpack_directory

KINDS = ("plain", "packed", "plain in shards")
NAME = "weights_checksums.json"


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    model = tiny_llama()
    sparsify(model, SparsityConfig())
    export_sparse(model, root / "plain")
    export_sparse(model, root / "packed", packed=True)
    export_sparse(model, root / "plain in shards", max_shard_size=40_000)
    return root


@pytest.fixture(params=KINDS)
def directory(request, exports, tmp_path):
    return shutil.copytree(exports / request.param, tmp_path / request.param)


def shards(directory):
    return sorted([*directory.glob("model*.safetensors"), *directory.glob("packed*.safetensors")])


def flip(path, place, bit=3):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def refused(directory, words):
    """All that read the weights refuse them, before anything is written or sent."""
    convert = unpack_directory if "packed" in directory.name else pack_directory
    for use in (
        lambda: load_sparse(directory),
        lambda: convert(directory, directory.parent / "converted"),
        lambda: push_directory(directory, "me/model"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            use()
    assert {path.name for path in directory.parent.iterdir()} == {directory.name}


# both in weights, in each of the exports
@pytest.mark.parametrize("place", [-1, -4001])
def test_a_flipped_bit(directory, place):
    path = shards(directory)[-1]
    flip(path, place)
    refused(directory, f"{path.name} cannot be used: its checksum is not the one in {NAME}")
    if "packed" in directory.name:
        with pytest.raises(ValueError, match="its checksum is not the one"):
            AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize(("size", "known"), [(-1, True), (-1, False), (100, False), (0, False)])
def test_a_truncated_file(directory, size, known):
    """Without checksums, as in early versions, the header shows it."""
    path = shards(directory)[0]
    path.write_bytes(path.read_bytes()[:size])
    if not known:
        (directory / NAME).unlink()
    refused(directory, f"{path.name} cannot be used: ")


def test_a_shard_of_another_export(directory, exports):
    path = shards(directory)[0]
    model = tiny_llama(seed=5)
    sparsify(model, SparsityConfig())
    other = export_sparse(
        model, directory.parent.parent / "other", packed=directory.name == "packed",
        max_shard_size=40_000 if "shards" in directory.name else "5GB",
    )  # fmt: skip
    try:
        shutil.copy(other / path.name, path)
        refused(directory, f"{path.name} cannot be used: its checksum is not the one in {NAME}")
    finally:
        shutil.rmtree(other)


def test_without_checksums_all_loads_as_before(directory):
    expected = load_sparse(directory).state_dict()
    (directory / NAME).unlink()
    found = load_sparse(directory).state_dict()
    assert all(found[name].equal(value) for name, value in expected.items())


def test_the_contents_of_the_list(directory):
    """The CRC-32 of gzip and zip, from another module."""
    contents = json.loads((directory / NAME).read_text())
    assert contents["files"] == {
        path.name: [path.stat().st_size, binascii.crc32(path.read_bytes())] for path in shards(directory)
    }


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ("{", f"{NAME} cannot be used"),
        ('{"format": "another", "files": {}}', f"{NAME} cannot be used: its format is 'another'"),
        ('{"format": "hf_chts weights, 1", "files": [1]}', f"{NAME} cannot be used"),
        ('{"format": "hf_chts weights, 1", "files": {}}', f"{NAME} cannot be used: .* disagree about"),
        ('{"format": "hf_chts weights, 1", "files": {"../x": [1, 2]}}', f"{NAME} cannot be used: .* disagree about"),
    ],
)
def test_a_damaged_list(exports, tmp_path, contents, words):
    directory = shutil.copytree(exports / "plain", tmp_path / "plain")
    (directory / NAME).write_text(contents)
    refused(directory, words)


def test_weights_that_were_changed_on_purpose(exports, tmp_path):
    directory = shutil.copytree(exports / "plain", tmp_path / "plain")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"if you changed the weights on purpose, delete {NAME}"):
        load_sparse(directory)
    (directory / NAME).unlink()
    assert load_sparse(directory).get_parameter("model.norm.weight").equal(torch.full((40,), 2.0))


def test_a_trainer_that_saves_over_an_export(tmp_path):
    run = trainer(tmp_path / "run", "set", save_strategy="no")
    export_sparse(run.model, tmp_path / "run")
    run.train()
    run.save_model()
    assert load_sparse(tmp_path / "run").lm_head.weight.equal(run.model.lm_head.weight)

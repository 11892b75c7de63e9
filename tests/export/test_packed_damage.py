"""Damaged and hostile directories are refused, the file is named, and nothing outside is opened or run."""

import json
import pickle
import re
import shutil
import struct
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_chts import SparsityConfig, export_sparse, load_sparse, sparsify
from hf_chts.checkpoint import mask_metadata
from hf_chts.checkpoint.topology_state import FORMAT
from hf_chts.export import pack_directory, unpack_directory, weight_files
from hf_chts.export.checksums import CHECKSUMS_NAME
from hf_chts.topology.bits import pack_bits

KEY = "model.layers.0.mlp.up_proj.weight"  # (60, 40)
SHARD = "packed-00001-of-00003.safetensors"
INDEX = "packed.safetensors.index.json"
HUGE = 2**62


class Attack:
    """A pickle that ends the process if it is read."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was run')",)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    model = tiny_llama()
    sparsify(model, SparsityConfig())
    export_sparse(model, root / "plain")
    pack_directory(root / "plain", root / "packed", max_shard_size=40_000)
    assert len(list((root / "packed").glob("packed-*.safetensors"))) == 3
    for name in ("plain", "packed"):  # an attacker would write matching ones, and early versions wrote none
        (root / name / CHECKSUMS_NAME).unlink()
    return root


def shard_of(directory, key):
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][key]


def change_json(name, change):
    def damage(directory):
        content = json.loads((directory / name).read_text())
        content = change(content) or content
        (directory / name).write_text(json.dumps(content))

    return damage


def change_tensors(change, key=f"{KEY}_bits"):
    """Rewrite the shard that has `key`, with other tensors; the index follows."""

    def damage(directory):
        path = shard_of(directory, key)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        before = load_file(path)
        after = change(dict(before))
        save_file(after, path, metadata)

        def follow(index):
            places = {name: place for name, place in index["weight_map"].items() if name not in before}
            index["weight_map"] = places | dict.fromkeys(after, path.name)

        change_json(INDEX, follow)(directory)

    return damage


def put(key, make):
    return change_tensors(lambda tensors: tensors | {f"{KEY}_{key}": make(tensors[f"{KEY}_{key}"])})


def drop(key):
    return change_tensors(lambda tensors: {name: value for name, value in tensors.items() if name != f"{KEY}_{key}"})


def change_header(change, name=SHARD):
    """Rewrite a safetensors header and leave the data as they are."""

    def damage(directory):
        data = (directory / name).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = change(data[8 : 8 + size].decode())
        header = header if isinstance(header, str) else json.dumps(header)
        (directory / name).write_bytes(struct.pack("<Q", len(header)) + header.encode() + data[8 + size :])

    return damage


def claim_shape(text):
    header = json.loads(text)
    name = next(name for name in header if name.endswith("_bits"))
    header[name]["shape"] = [HUGE, 4]
    return header


def change_metadata(change):
    def change_one(text):
        header = json.loads(text)
        said = json.loads(header["__metadata__"]["hf_chts"])
        header["__metadata__"]["hf_chts"] = json.dumps(change(said) or said)
        return header

    return change_header(change_one)


def redirect(name):
    """Point one shard of the index elsewhere, where a copy of it is."""

    def damage(directory):
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(directory / SHARD, target)

        def point(index):
            index["weight_map"] = {
                key: str(name) if place == SHARD else place for key, place in index["weight_map"].items()
            }

        change_json(INDEX, point)(directory)

    return damage


def redirect_all(folder):
    """Point the whole index to a copy of the directory, which is in order itself."""

    def damage(directory):
        shutil.copytree(directory, directory / folder)
        change_json(
            INDEX,
            lambda index: index.update(
                weight_map={key: f"{folder}/{place}" for key, place in index["weight_map"].items()}
            ),
        )(directory)

    return damage


def cut(name, size):
    def damage(directory):
        (directory / name).write_bytes((directory / name).read_bytes()[:size])

    return damage


def copy_of_a_tensor(directory):
    path = directory / "packed-00003-of-00003.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    other = load_file(directory / SHARD)
    save_file(load_file(path) | {name: other[name] for name in list(other)[:1]}, path, metadata)


def flip(bits):
    bits[3] ^= 1
    return bits


def pickled_weights(directory):
    for path in directory.glob("packed*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Attack()))


def pickled_shard(directory):
    (directory / SHARD).write_bytes(pickle.dumps(Attack()) * 50)


def add_metadata(directory):
    """Say of a weight that it is stored transposed."""
    change_header(
        lambda text: text.replace('\\"transposed\\": []', f'\\"transposed\\": [\\"{KEY}\\"]'),
        shard_of(directory, f"{KEY}_bits").name,
    )(directory)


def without(unwanted):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if unwanted not in name}


def set_config(**changes):
    return change_json("config.json", lambda config: config.update(changes))


def shape(*sizes):
    return put("shape", lambda _: torch.tensor(sizes))


# what happens to the packed directory, and what load_sparse names: the file, the tensor and its sizes
DAMAGE = {
    "the index leads up": (redirect("../../outside.safetensors"), INDEX),
    "the index leads up to a shard's name": (redirect(f"../other/{SHARD}"), INDEX),
    "the index leads to a folder below": (redirect(f"below/{SHARD}"), INDEX),
    "the index has an absolute path": (
        lambda directory: redirect(directory.parent / "absolute.safetensors")(directory),
        INDEX,
    ),
    "the index leads to another export": (redirect_all("../other"), INDEX),
    "the index leads to an export below": (redirect_all("below"), INDEX),
    "the index has numbers for names": (change_json(INDEX, lambda index: index.update(weight_map={KEY: 7})), INDEX),
    "the index has no map": (change_json(INDEX, lambda index: {"metadata": {}}), INDEX),
    "the index is a list": (change_json(INDEX, lambda index: [index]), f"{INDEX} .*list"),
    "the index is no JSON": (cut(INDEX, 100), INDEX),
    "the index is nested deeply": (lambda directory: (directory / INDEX).write_text("[" * 100_000), INDEX),
    "the index is missing": (lambda directory: (directory / INDEX).unlink(), "neither packed.safetensors nor"),
    "the index lacks a tensor": (
        change_json(INDEX, lambda index: index["weight_map"].pop(f"{KEY}_values") and None),
        f"{INDEX} .*{KEY}_values",
    ),
    "the index has a tensor too many": (
        change_json(INDEX, lambda index: index["weight_map"].update(more=SHARD)),
        f"{INDEX} .*more in {SHARD}",
    ),
    "a shard is missing": (lambda directory: (directory / SHARD).unlink(), f"{SHARD} is missing"),
    "a shard is a folder": (
        lambda directory: ((directory / SHARD).unlink(), (directory / SHARD).mkdir()),
        f"{SHARD} is missing",
    ),
    "a shard too many": (
        lambda directory: shutil.copy(directory / SHARD, directory / "packed-00001-of-00009.safetensors"),
        "packed-00001-of-00009.safetensors",
    ),
    "a shard is cut": (cut(SHARD, 10_000), SHARD),
    "a shard is cut in its header": (cut(SHARD, 100), SHARD),
    "a shard is empty": (cut(SHARD, 0), SHARD),
    "a shard is a pickle": (pickled_shard, SHARD),
    "only a pickle": (pickled_weights, "neither packed.safetensors nor packed.safetensors.index.json"),
    "a tensor in two shards": (copy_of_a_tensor, "packed-00003-of-00003.safetensors"),
    "a header twice as long as the file": (
        lambda directory: (directory / SHARD).write_bytes(struct.pack("<Q", 2**40) + b"{}" * 100),
        SHARD,
    ),
    "a header with sizes that overflow": (change_header(claim_shape), SHARD),
    "a header that is no JSON": (change_header(lambda text: "[" * len(text)), SHARD),
    "a header without our metadata": (change_header(lambda text: json.loads(text) | {"__metadata__": {}}), SHARD),
    "a format of later": (change_metadata(lambda said: said.update(version=3)), f"{SHARD} .*version 3.*upgrade"),
    "metadata of another kind": (change_metadata(lambda said: said.update(transposed=[7])), f"{SHARD} .*transposed"),
    "an unknown weight is transposed": (change_metadata(lambda said: said.update(transposed=["x.weight"])), "x.weight"),
    "a weight is said to be transposed": (add_metadata, f"{KEY} is transposed"),
    "an absurd shape": (shape(HUGE, HUGE), f"{KEY} .*{HUGE} × {HUGE}"),
    "a shape whose product overflows to 0": (shape(2**61, 8), f"{KEY} .*{2**61} × 8"),
    "a negative shape": (shape(-60, -40), f"{KEY} .*-60 × -40"),
    "an empty shape": (shape(0, 40), f"{KEY} .*0 × 40"),
    "a shape of three": (shape(60, 40, 1), f"{KEY} .*I64 \\(3,\\)"),
    "another shape of that size": (shape(40, 60), f"{KEY} is \\(40, 60\\) .*\\(60, 40\\) in the LlamaForCausalLM"),
    "too few bits": (put("bits", lambda bits: bits[:-1].clone()), f"{KEY} .*60 × 40.* 299 bytes"),
    "too many bits": (put("bits", lambda bits: torch.cat([bits, bits])), f"{KEY} .*60 × 40.* 600 bytes"),
    "bits of another type": (put("bits", lambda bits: bits.to(torch.int16)), f"{KEY} has bits I16"),
    "a link more than values": (put("bits", flip), f"{KEY} has [0-9]+ links and 1200 values"),
    "a value too few": (put("values", lambda values: values[:-1].clone()), f"{KEY} has 1200 links and 1199 values"),
    "more values than weights": (put("values", lambda values: torch.cat([values] * 3)), f"{KEY} has 3600 values"),
    "values of integers": (put("values", lambda values: values.int()), f"{KEY} are I32"),
    "values in rows": (put("values", lambda values: values.view(60, 20)), f"{KEY} are F32 \\(60, 20\\)"),
    "no bits": (drop("bits"), f"{KEY}_bits is missing"),
    "no values": (drop("values"), f"{KEY}_values is missing"),
    "no shape": (drop("shape"), f"{KEY}_shape is missing"),
    "a weight packed and plain": (change_tensors(lambda tensors: tensors | {KEY: torch.zeros(60, 40)}), KEY),
    "a weight of another model": (
        change_tensors(lambda tensors: {name.replace("up_proj", "side_proj"): t for name, t in tensors.items()}),
        f"{KEY.replace('up_proj', 'side_proj')} .*absent",
    ),
    "a weight is gone": (change_tensors(without(KEY)), KEY),
    "a dense tensor is gone": (change_tensors(without("model.norm.weight"), "model.norm.weight"), "model.norm.weight"),
    "a config of another version": (
        change_json("config.json", lambda config: config["quantization_config"].update(version=99)),
        "config.json is version 99 .*upgrade",
    ),
    "a config with more": (
        change_json("config.json", lambda config: config["quantization_config"].update(path="/etc/passwd")),
        "config.json .*'path'",
    ),
    "a config that leads to another": (
        set_config(configuration_files=["config.4.0.0.json"]),
        "config.json .*configuration_files",
    ),
    "a config that asks for attention code": (
        set_config(attn_implementation="evil/kernel"),
        "config.json .*'evil/kernel'",
    ),
    "a config without a type": (
        change_json("config.json", lambda config: config.pop("dtype") and None),
        "config.json .*no dtype",
    ),
    "a config of another size": (set_config(intermediate_size=64), "\\(40, 60\\) .*\\(40, 64\\)"),
    "a config that is a number": (lambda directory: (directory / "config.json").write_text("7"), "config.json .*int"),
    "an adapter": (
        lambda directory: (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}'),
        "adapter_config.json",
    ),
    "no sparsity config": (lambda directory: (directory / "sparsity_config.json").unlink(), "sparsity_config.json"),
}
# what plain from_pretrained cannot notice: it needs no masks, transformers reads the config itself, and missing weights
# are initialized as for any checkpoint
LOADS_PLAIN = {
    "a config that leads to another",
    "a config that asks for attention code",
    "a weight is said to be transposed",
    "a weight is gone",
    "a dense tensor is gone",
    "an adapter",
    "no sparsity config",
}
# consistent files, of another model than config.json's, or with settings in it that only loading reads
UNPACKS = (
    {name for name in DAMAGE if name.startswith("a config ")} - {"a config that is a number"}
    | {"another shape of that size", "a weight of another model", "a weight is said to be transposed"}
    | {"a weight is gone", "a dense tensor is gone", "an adapter", "no sparsity config"}
)


@pytest.fixture
def opened(monkeypatch):
    """The safetensors files that are opened, anywhere."""
    paths = []

    def recording(path, *args, **kwargs):
        paths.append(Path(path).resolve())
        return safe_open(path, *args, **kwargs)

    monkeypatch.setattr(weight_files, "safe_open", recording)
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", recording)
    return paths


@pytest.mark.parametrize("name", DAMAGE)
def test_a_packed_directory(tmp_path, exports, opened, name):
    damage, message = DAMAGE[name]
    directory = tmp_path / "a" / "packed"
    shutil.copytree(exports / "packed", directory)
    damage(directory)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_sparse(directory)
    assert str(directory) in str(caught.value) or "config.json" in message
    if name not in LOADS_PLAIN:
        # the class itself does not know the directory before it looks for files
        for loader in (AutoModelForCausalLM, LlamaForCausalLM):
            with pytest.raises((ValueError, OSError, AttributeError, TypeError, KeyError, RecursionError)):
                loader.from_pretrained(directory)
    with nullcontext() if name in UNPACKS else pytest.raises((ValueError, OSError)):
        unpack_directory(directory, tmp_path / "unpacked")
    assert all(path.parent == directory.resolve() for path in opened)


def test_the_table_is_of_damage(tmp_path, exports):
    """The undamaged directory loads."""
    load_sparse(exports / "packed")
    AutoModelForCausalLM.from_pretrained(exports / "packed")
    unpack_directory(exports / "packed", tmp_path / "unpacked")


def test_code_in_a_packed_directory_is_not_run(tmp_path, exports):
    directory = tmp_path / "packed"
    shutil.copytree(exports / "packed", directory)
    (directory / "modeling_mine.py").write_text("raise SystemExit('ran')")
    for name in ("pytorch_model.bin", "model.bin", "training_args.bin"):
        (directory / name).write_bytes(pickle.dumps(Attack()))
    change_json(
        "config.json", lambda config: config.update(auto_map={"AutoModelForCausalLM": "modeling_mine.LlamaForCausalLM"})
    )(directory)
    change_json("config.json", lambda config: config.update(transformers_weights="../../x.safetensors"))(directory)
    assert type(load_sparse(directory)).__module__.startswith("transformers.")
    assert type(AutoModelForCausalLM.from_pretrained(directory)).__module__.startswith("transformers.")
    assert "modeling_mine" not in " ".join(sys.modules)
    # a type of model that only the directory's code knows
    change_json("config.json", lambda config: config.update(model_type="mine", architectures=["Mine"]))(directory)
    with pytest.raises(ValueError, match="mine"):
        load_sparse(directory)


def put_plain(directory, key, value):
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {key: value}, directory / "model.safetensors", {"format": "pt"})


def write_masks(directory, change):
    """A masks.safetensors with another content, and the digest of that."""
    tensors = load_file(directory / "masks.safetensors")
    with safe_open(directory / "masks.safetensors", "pt") as file:
        shapes = {name: tuple(shape) for name, shape in json.loads(file.metadata()["shapes"]).items()}
    change(tensors, shapes)
    metadata = mask_metadata(tensors, shapes)
    assert metadata["format"] == FORMAT
    save_file(tensors, directory / "masks.safetensors", metadata)


def plain_index(name):
    def damage(directory):
        keys = list(load_file(directory / "model.safetensors"))
        (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


NAME = KEY.removesuffix(".weight")
PLAIN = {
    "the index leads up": (plain_index("../outside.safetensors"), "index.json cannot be used"),
    "a shard is missing": (plain_index("model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors"),
    "only a pickle": (
        lambda directory: (directory / "model.safetensors").rename(directory / "pytorch_model.bin"),
        "has neither model.safetensors nor model.safetensors.index.json",
    ),
    "no masks": (lambda directory: (directory / "masks.safetensors").unlink(), "masks.safetensors is missing"),
    "weights are named in the config": (
        change_json("config.json", lambda config: config.update(transformers_weights="../outside.safetensors")),
        "config.json cannot be used: it has transformers_weights",
    ),
    "a mask of an absurd shape": (
        lambda directory: write_masks(directory, lambda tensors, shapes: shapes.update({NAME: (HUGE, HUGE)})),
        f"masks.safetensors cannot be used: the mask of {NAME}",
    ),
    "a mask of the shape turned": (
        lambda directory: write_masks(directory, lambda tensors, shapes: shapes.update({NAME: (40, 60)})),
        "",
    ),
    "a mask with a bit after its end": (
        lambda directory: write_masks(
            directory,
            lambda tensors, shapes: (
                shapes.update({NAME: (59, 33)}),
                tensors.update({f"{NAME}.mask": torch.full((244,), 255, dtype=torch.uint8)}),
            ),
        ),
        "",
    ),
    "another mask": (
        lambda directory: write_masks(
            directory, lambda tensors, shapes: tensors.update({f"{NAME}.mask": pack_bits(torch.eye(60, 40) > 0)})
        ),
        f"{NAME} has weights off its mask",
    ),
    "weights of integers": (lambda directory: put_plain(directory, KEY, torch.zeros(60, 40, dtype=torch.int8)), ""),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_directory(tmp_path, exports, opened, name):
    damage, message = PLAIN[name]
    directory = tmp_path / "a" / "plain"
    shutil.copytree(exports / "plain", directory)
    damage(directory)
    if name != "weights of integers":  # which from_pretrained turns into floats
        with pytest.raises((ValueError, FileNotFoundError), match=re.compile(message)):
            load_sparse(directory)
    by_config = name == "weights are named in the config"  # which packing replaces
    with nullcontext() if by_config else pytest.raises((ValueError, FileNotFoundError)):
        pack_directory(directory, tmp_path / "packed")
    assert all(path.parent == directory.resolve() for path in opened)
    assert by_config or {path.name for path in tmp_path.iterdir()} == {"a"}  # nothing half written

"""Packed exports: exact, small, loaded by load_sparse and plain from_pretrained, refused without hf_chts."""

import json
import os
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from architecture import outputs, same
from safetensors.torch import load_file
from tiny import VOCABULARY, random_blocks, tiny_llama
from tiny_architectures import ARCHITECTURES
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, Trainer, TrainingArguments

from hf_chts import SparsityConfig, SparsityHandle, export_sparse, load_sparse, sparsify
from hf_chts.__main__ import main
from hf_chts.export import pack_directory, unpack_directory
from hf_chts.export.packed_format import pack_values, unpack_weight
from hf_chts.model_arguments import ModelArguments, load_config

IDS = torch.arange(30).view(2, 15) % VOCABULARY
KEY = "model.layers.0.mlp.up_proj.weight"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sparse_llama(dtype=torch.float32, **changes):
    model = tiny_llama(**changes).to(dtype)
    sparsify(model, SparsityConfig())
    return model.eval()


def same_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other, integers = right[name], INTEGERS[tensor.element_size()]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        assert other.contiguous().view(integers).equal(tensor.contiguous().view(integers)), name
    return True


def stored(directory):
    return {
        key: tensor
        for file in sorted(directory.glob("*-*-of-*.safetensors"))
        for key, tensor in load_file(file).items()
    }


def sizes(directory):
    return {path.name: path.stat().st_size for path in directory.iterdir()}


def test_a_weight_by_hand():
    # rows 0 and 1 of five weights: bits 1, 4, 5 and 8 counted from the lowest; -0.0 and 0.0 are values like any other
    mask = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 1, 0]], dtype=torch.bool)
    weight = torch.tensor([[0, 2.5, 0, 0, -0.0], [0.0, 0, 0, 7, 0]])
    values = pack_values(weight, mask)
    assert values.view(torch.int32).tolist() == torch.tensor([2.5, -0.0, 0.0, 7]).view(torch.int32).tolist()
    again = unpack_weight(torch.tensor([0b00110010, 0b1], dtype=torch.uint8), values, (2, 5))
    assert same_bits({"": again}, {"": weight})


def test_a_weight_of_several_blocks():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1031, 1027, generator=generator) < 0.3  # twice the block and a rest, no multiple of eight
    weight = torch.randn(mask.shape, generator=generator).masked_fill(~mask, 0)
    assert pack_values(weight, mask).equal(weight[mask])
    flat = torch.cat([mask.view(-1), torch.zeros(-mask.numel() % 8, dtype=torch.bool)]).view(-1, 8)
    bits = (flat * 2 ** torch.arange(8)).sum(1).to(torch.uint8)
    assert unpack_weight(bits, weight[mask], (1031, 1027)).equal(weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_nan_and_infinity_survive(dtype):
    """Early versions packed them; they are refused now."""
    weight = torch.zeros(2, 6, dtype=dtype)
    numbers = weight.view(INTEGERS[weight.element_size()])
    infinity = torch.tensor(float("inf"), dtype=dtype).view(numbers.dtype).item()
    numbers[0, :3] = torch.tensor([infinity, infinity + 3, infinity + 5])  # NaNs with other payloads
    weight[1, 2] = float("-inf")
    mask = numbers.ne(0)
    bits = torch.tensor([0b00000111, 0b1], dtype=torch.uint8)
    assert same_bits({"": unpack_weight(bits, pack_values(weight, mask), (2, 6))}, {"": weight})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_bit_survives(tmp_path, dtype):
    model = sparse_llama(dtype)
    for layer in SparsityHandle.of(model).layers.values():
        links = layer.mask.nonzero()[:4]
        numbers = layer.weight.data.view(INTEGERS[layer.weight.element_size()])
        for link, number in zip(links, [0, -0.0, 1, 2], strict=True):
            # integers are bit patterns: 0 and the smallest of subnormal numbers
            if isinstance(number, int):
                numbers[tuple(link)] = number
            else:
                layer.weight.data[tuple(link)] = number
    plain = export_sparse(model, tmp_path / "plain")
    packed = export_sparse(model, tmp_path / "packed", packed=True)
    assert sizes(pack_directory(plain, tmp_path / "converted")) == sizes(packed)
    assert same_bits(stored(tmp_path / "converted"), stored(packed))
    unpack_directory(packed, tmp_path / "unpacked")
    expected = load_file(plain / "model.safetensors")
    assert same_bits(load_file(tmp_path / "unpacked/model.safetensors"), expected)
    assert same_bits(load_file(tmp_path / "unpacked/masks.safetensors"), load_file(plain / "masks.safetensors"))
    for name in ("config.json", "generation_config.json", "sparsity_config.json", "README.md"):
        assert (tmp_path / "unpacked" / name).read_text() == (plain / name).read_text()
    loaded = load_sparse(packed)
    assert same_bits(dict(loaded.state_dict()), dict(model.state_dict()))
    masks = SparsityHandle.of(loaded).masks()
    assert all(mask.equal(masks[name]) for name, mask in SparsityHandle.of(model).masks().items())  # zeros are links
    assert same_bits(dict(AutoModelForCausalLM.from_pretrained(packed).state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bert, questions", "t5", "whisper"])
def test_packed_and_unpacked_again(tmp_path, name):
    architecture = ARCHITECTURES[name]
    model = architecture.model().eval()
    sparse = sparsify(model, SparsityConfig(method="set", sparsity=0.8, target_modules=architecture.target_modules))
    plain, packed = export_sparse(model, tmp_path / "plain"), export_sparse(model, tmp_path / "packed", packed=True)
    loaded, info = architecture.loader.from_pretrained(packed, output_loading_info=True)
    assert not any(info.values())
    assert same_bits(dict(loaded.state_dict()), dict(model.state_dict()))
    again = load_sparse(packed)
    assert type(again) is type(model)
    handle = SparsityHandle.of(again)
    assert handle.config == sparse.config
    assert same_bits(handle.masks(), sparse.masks())
    # without the model, its class shows how weights are stored
    assert same_bits(stored(pack_directory(plain, tmp_path / "again")), stored(packed))
    loaded.save_pretrained(tmp_path / "resaved")
    unpack_directory(packed, tmp_path / "unpacked")
    for directory in ("resaved", "unpacked"):
        assert same_bits(load_file(tmp_path / directory / "model.safetensors"), load_file(plain / "model.safetensors"))
    assert same_bits(load_file(tmp_path / "unpacked/masks.safetensors"), load_file(plain / "masks.safetensors"))
    batch = architecture.batch(2)
    assert same(outputs(loaded, batch), outputs(model, batch))


@pytest.mark.parametrize("name", ["vit", "llava"])
def test_weights_that_transformers_stores_under_other_names(tmp_path, name):
    architecture = ARCHITECTURES[name]
    model = architecture.model().eval()
    masks = sparsify(model, SparsityConfig(method="set", sparsity=0.8)).masks()
    plain, packed = export_sparse(model, tmp_path / "plain"), export_sparse(model, tmp_path / "packed", packed=True)
    assert not {f"{name}.weight" for name in masks} & load_file(plain / "model.safetensors").keys()
    with pytest.raises(ValueError, match="weights under other names. Load it with load_sparse, and pack it with"):
        pack_directory(plain, tmp_path / "again")
    export_sparse(load_sparse(plain), tmp_path / "again", packed=True)
    assert same_bits(stored(tmp_path / "again"), stored(packed))
    unpack_directory(packed, tmp_path / "unpacked")
    batch = architecture.batch(2)
    expected = outputs(model, batch)
    for directory in ("plain", "packed", "again", "unpacked"):
        loaded, info = architecture.loader.from_pretrained(tmp_path / directory, output_loading_info=True)
        assert not any(info.values())
        again = load_sparse(tmp_path / directory)
        assert type(again) is type(loaded) is type(model)
        assert same_bits(SparsityHandle.of(again).masks(), masks)
        assert same(outputs(again, batch), expected)
        assert same(outputs(loaded, batch), expected)


def test_what_is_written(tmp_path):
    model = ARCHITECTURES["gpt2"].model()
    layer = sparsify(model, SparsityConfig(method="set", sparsity=0.8)).layers["transformer.h.0.attn.c_attn"]
    export_sparse(model, tmp_path, packed=True, training={"seed": 3})
    names = {path.name for path in tmp_path.iterdir()}
    weights = {"packed-00001-of-00001.safetensors", "packed.safetensors.index.json", "weights_checksums.json"}
    assert names == weights | {"config.json", "generation_config.json", "sparsity_config.json", "README.md"}
    tensors = stored(tmp_path)
    key = "transformer.h.0.attn.c_attn.weight"
    # weight, bits and values are stored as (in, out)
    rows, columns = layer.weight.shape
    assert tensors[f"{key}_shape"].tolist() == [rows, columns]
    assert tensors[f"{key}_values"].equal(layer.weight[layer.mask])
    assert tensors[f"{key}_bits"].shape == (-(-rows * columns // 8),)
    assert bool(tensors[f"{key}_bits"][0] & 1) == bool(layer.mask[0, 0])
    assert [bool(tensors[f"{key}_bits"][5] >> bit & 1) for bit in range(8)] == layer.mask.view(-1)[40:48].tolist()
    assert tensors["transformer.wte.weight"].equal(model.transformer.wte.weight)
    card = (tmp_path / "README.md").read_text()
    assert "import hf_chts  # pip install hf_chts" in card
    assert "| seed | 3 |" in card
    assert "nothing but `transformers` is\nneeded" not in card


def test_size(tmp_path):
    model = tiny_llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=1, vocab_size=1024).bfloat16()
    sparse = sparsify(model, SparsityConfig(method="set", sparsity=0.9))
    export_sparse(model, tmp_path, packed=True)
    weights = sum(mask.numel() for mask in sparse.masks().values())
    dense = sum(parameter.numel() for parameter in model.parameters()) - weights
    assert sum(sizes(tmp_path).values()) <= 1.02 * (2 * sparse.links() + weights / 8 + 2 * dense)


def test_a_loaded_model_is_a_plain_one(tmp_path):
    model = sparse_llama(tie_word_embeddings=True)
    packed = export_sparse(model, tmp_path / "packed", packed=True)
    loaded = AutoModelForCausalLM.from_pretrained(packed)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not loaded.training
    assert getattr(loaded, "hf_quantizer", None) is None
    assert not loaded.is_quantized
    for name in ("quantization_config", "transformers_weights", "_is_quantized"):
        assert not hasattr(loaded.config, name)
    loaded.save_pretrained(tmp_path / "resaved")
    assert not {"quantization_config", "transformers_weights"} & set(
        json.loads((tmp_path / "resaved/config.json").read_text())
    )
    settings = {"max_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_steps": 2}
    trainer = Trainer(loaded, TrainingArguments(str(tmp_path / "run"), **settings), train_dataset=random_blocks())
    trainer.train()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-2")
    assert same_bits(dict(trained.state_dict()), dict(loaded.state_dict()))
    assert not trained.get_parameter(KEY).equal(model.get_parameter(KEY))


def test_options_of_from_pretrained(tmp_path):
    model = sparse_llama()
    packed = export_sparse(model, tmp_path / "packed", packed=True)
    half = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    assert same_bits(dict(half.state_dict()), dict(sparse_llama().bfloat16().state_dict()))
    assert load_sparse(packed, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert same_bits(dict(LlamaForCausalLM.from_pretrained(packed).state_dict()), dict(model.state_dict()))
    body, info = LlamaModel.from_pretrained(packed, output_loading_info=True)
    assert info["missing_keys"] == set()
    assert same_bits(dict(body.state_dict()), dict(model.model.state_dict()))
    on_a_map = AutoModelForCausalLM.from_pretrained(packed, device_map="cpu")
    assert same_bits(dict(on_a_map.state_dict()), dict(model.state_dict()))
    below = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="packed")
    assert same_bits(dict(below.state_dict()), dict(model.state_dict()))
    with pytest.raises(ValueError, match="cannot be offloaded to disk. Make a plain directory"):
        AutoModelForCausalLM.from_pretrained(packed, device_map={"": "disk"}, offload_folder=tmp_path / "offload")


def test_many_shards(tmp_path):
    model = sparse_llama()
    limit = 12_000
    packed = export_sparse(model, tmp_path / "packed", packed=True, max_shard_size=limit)
    shards = sorted(packed.glob("packed-*.safetensors"))
    assert len(shards) > 5
    for shard in shards:
        keys = set(load_file(shard))
        layers = {key.rsplit("_", 1)[0] for key in keys if key.endswith("_bits")}
        assert {f"{key}_{kind}" for key in layers for kind in ("bits", "values", "shape")} <= keys
        assert sum(tensor.nbytes for tensor in load_file(shard).values()) <= limit or len(keys) == 1
    assert same_bits(dict(load_sparse(packed).state_dict()), dict(model.state_dict()))
    assert same_bits(dict(AutoModelForCausalLM.from_pretrained(packed).state_dict()), dict(model.state_dict()))
    unpacked = unpack_directory(packed, tmp_path / "unpacked", max_shard_size="20KB")
    assert len(list(unpacked.glob("model-*.safetensors"))) > 3
    assert same_bits(dict(load_sparse(unpacked).state_dict()), dict(model.state_dict()))
    assert same_bits(stored(pack_directory(unpacked, tmp_path / "again")), stored(packed))


def test_from_the_hub(tmp_path, monkeypatch):
    model = sparse_llama()
    for kind in ("plain", "packed"):
        sha = "0" * 40
        snapshot = tmp_path / f"hub/models--me--{kind}/snapshots/{sha}"
        export_sparse(model, snapshot, packed=kind == "packed")
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs/main").write_text(sha)
        options = {"cache_dir": tmp_path / "hub", "local_files_only": True}
        loaded = load_sparse(f"me/{kind}", revision="main", **options)
        assert same_bits(dict(loaded.state_dict()), dict(model.state_dict()))
        assert SparsityHandle.of(loaded).links() == SparsityHandle.of(model).links()
        by_class = AutoModelForCausalLM.from_pretrained(f"me/{kind}", **options)
        assert same_bits(dict(by_class.state_dict()), dict(model.state_dict()))
    asked = {}
    monkeypatch.setattr(
        "hf_chts.export.sources.snapshot_download", lambda name, **given: asked.update(given, name=name) or snapshot
    )
    load_sparse("me/packed", token="hf_secret", revision="v1")
    assert (asked["name"], asked["token"], asked["revision"]) == ("me/packed", "hf_secret", "v1")
    files = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    files += ["masks.safetensors", "packed-00001-of-00001.safetensors", "packed.safetensors.index.json"]
    files += ["weights_checksums.json", "sparsity_config.json", "generation_config.json"]
    others = ["pytorch_model.bin", "optimizer.pt", "modeling_mine.py", "README.md", "adapter_config.json", "a/model.py"]
    filtered = huggingface_hub.utils.filter_repo_objects(files + others, allow_patterns=asked["allow_patterns"])
    assert set(filtered) == set(files)


def test_what_is_not_an_export(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no directory .*nowhere"):
        load_sparse(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="me/nothing is not a local directory"):
        load_sparse("me/nothing", local_files_only=True, cache_dir=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        load_sparse(tmp_path / "file")


def test_exporting_again_replaces_the_weights(tmp_path):
    first, second = sparse_llama(seed=1), sparse_llama(seed=2)
    export_sparse(first, tmp_path)
    (tmp_path / "mine.txt").write_text("kept")
    export_sparse(second, tmp_path, packed=True, max_shard_size=12_000)
    assert not list(tmp_path.glob("model*")) + list(tmp_path.glob("masks*"))
    assert same_bits(dict(load_sparse(tmp_path).state_dict()), dict(second.state_dict()))
    export_sparse(first, tmp_path, packed=True)
    assert same_bits(dict(load_sparse(tmp_path).state_dict()), dict(first.state_dict()))
    export_sparse(second, tmp_path)
    assert not list(tmp_path.glob("packed*"))
    assert same_bits(dict(load_sparse(tmp_path).state_dict()), dict(second.state_dict()))
    assert (tmp_path / "mine.txt").read_text() == "kept"
    assert not [path for path in tmp_path.parent.iterdir() if path.name.startswith(f".{tmp_path.name}")]


def test_a_new_model_from_the_config_of_a_packed_one(tmp_path):
    packed = export_sparse(sparse_llama(), tmp_path / "packed", packed=True)
    for config in (AutoConfig.from_pretrained(packed), load_config(ModelArguments(model=str(packed)))):
        model = AutoModelForCausalLM.from_config(config)
        sparsify(model, SparsityConfig())
        export_sparse(model, tmp_path / "new")
        assert same_bits(dict(load_sparse(tmp_path / "new").state_dict()), dict(model.state_dict()))
    assert not hasattr(config, "quantization_config")


def test_refusals(tmp_path):
    dense = tiny_llama()
    sparsify(dense, SparsityConfig(method="dense"))
    with pytest.raises(ValueError, match="a dense model has nothing to pack: export it plain"):
        export_sparse(dense, tmp_path / "x", packed=True)
    assert not (tmp_path / "x").exists()
    export_sparse(dense, tmp_path / "dense")
    with pytest.raises(ValueError, match="dense is a dense model"):
        pack_directory(tmp_path / "dense", tmp_path / "x")
    plain = export_sparse(sparse_llama(), tmp_path / "plain")
    packed = pack_directory(plain, tmp_path / "packed")
    with pytest.raises(ValueError, match="packed is packed already"):
        pack_directory(packed, tmp_path / "x")
    with pytest.raises(ValueError, match="plain is not packed"):
        unpack_directory(plain, tmp_path / "x")
    with pytest.raises(FileExistsError, match="packed already exists"):
        pack_directory(plain, packed)
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        pack_directory(tmp_path, tmp_path / "x")
    with pytest.raises(ValueError, match="leave quantization_config out"):
        AutoModelForCausalLM.from_pretrained(plain, quantization_config={"quant_method": "hf_chts"})
    with pytest.raises(ValueError, match="export is plain or packed, got 'zip'"):
        ModelArguments(export="zip")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "plain", "packed"}


def test_commands(tmp_path, capsys):
    plain = export_sparse(sparse_llama(), tmp_path / "plain")
    main(["pack", str(plain), str(tmp_path / "packed"), "--max_shard_size", "9KB"])
    assert str(tmp_path / "packed") in capsys.readouterr().out
    assert len(list((tmp_path / "packed").glob("packed-*.safetensors"))) > 5
    main(["unpack", str(tmp_path / "packed"), str(tmp_path / "again")])
    assert same_bits(load_file(tmp_path / "again/model.safetensors"), load_file(plain / "model.safetensors"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory of its process from Linux")
def test_conversion_holds_a_layer_and_not_the_model(tmp_path):
    # 28 MiB of layers, the largest of 1 MiB; without the model's classes, which cost more than that
    model = tiny_llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=7)
    sparsify(model, SparsityConfig(method="set", sparsity=0.5))
    plain = export_sparse(model, tmp_path / "plain")
    script = """
import sys, threading, time
import torch
from hf_chts.export import convert
torch.set_num_threads(1)
def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
def peak(work):
    done, most, before = threading.Event(), [0], held()
    def watch():
        while not done.is_set():
            most[0] = max(most[0], held() - before)
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    return most[0]
plain, out = sys.argv[1:]
convert.pack_directory(plain, out + "/warm", transposed=[])
print(peak(lambda: convert.pack_directory(plain, out + "/packed", transposed=[])))
print(peak(lambda: convert.unpack_directory(out + "/packed", out + "/unpacked")))
"""
    result = subprocess.run([sys.executable, "-c", script, plain, tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    packing, unpacking = map(float, result.stdout.split())
    assert packing < 12, result.stdout
    assert unpacking < 12, result.stdout

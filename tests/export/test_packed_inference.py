"""load_sparse(…, compute="sparse"): the model that from_pretrained gives, with its weights packed."""

import copy
import io
import json

import pytest
import torch
from cases import trainer
from safetensors.torch import load_file, save_file
from test_linked_loading import gpt2, t5, tied
from tiny import tiny_llama
from tiny_architectures import ARCHITECTURES
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from hf_chts import SparsityConfig, export_sparse, load_sparse, sparsify
from hf_chts.export.checksums import CHECKSUMS_NAME
from hf_chts.layers.linked_layer import LinkedLayer
from hf_chts.layers.packed_layer import PackedLayer
from hf_chts.layers.packed_model import packed_layers


def bfloat16():
    return tiny_llama(dtype=torch.bfloat16, num_key_value_heads=2).bfloat16()


def exported(directory, build, packed=True, storage="masked", **options):
    torch.manual_seed(0)
    model = build()
    sparsify(model, SparsityConfig("set", **({"sparsity": 0.8, "storage": storage} | options)))
    return export_sparse(model, directory, packed=packed)


def close(found, expected):
    tolerance = 2e-2 if expected.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("build", [tiny_llama, bfloat16, gpt2, t5, tied])
def test_as_the_dense_model(tmp_path, build, packed):
    directory = exported(tmp_path, build, packed)
    model = load_sparse(directory, compute="sparse")
    dense = type(model).from_pretrained(directory)
    layers = packed_layers(model)
    assert layers
    for name, layer in layers.items():
        weight = dense.get_submodule(name).weight
        assert layer.weight.equal(weight)
        assert layer.packed_values.dtype == weight.dtype
        assert layer.links == weight.count_nonzero()
    others = {name for name, _ in model.named_parameters()}
    assert not {f"{name}.weight" for name in layers} & others
    for name in others:
        assert model.get_parameter(name).equal(dense.get_parameter(name)), name
    assert model.dtype == dense.dtype
    more = {"decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)} if build is t5 else {}
    for length in (1, 3, 20):
        ids = torch.randint(1, 90, (2, length))
        for _ in range(2):  # the second time layers that read one input are taken together
            close(model(input_ids=ids, **more).logits, dense(input_ids=ids, **more).logits)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    assert model.generate(ids, **options).equal(dense.generate(ids, **options))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "llava", "vit"])
def test_weights_that_are_stored_under_other_names(tmp_path, name, packed):
    architecture = ARCHITECTURES[name]
    model = architecture.model(seed=3)
    sparse = sparsify(model, SparsityConfig("set", target_modules=architecture.target_modules))
    loaded = load_sparse(export_sparse(model, tmp_path, packed=packed), compute="sparse")
    assert packed_layers(loaded).keys() == sparse.layers.keys()
    for name, layer in packed_layers(loaded).items():
        assert layer.weight.equal(sparse.layers[name].weight)


@pytest.mark.parametrize("storage", ["masked", "links"])
def test_other_sources(tmp_path, storage):
    run = trainer(tmp_path, "set", storage=storage, save_steps=24)
    run.train()
    ids = torch.randint(0, 90, (1, 5))
    expected = run.model.eval()(ids).logits.detach()
    for source in (tmp_path / "checkpoint-24", export_sparse(run.model, tmp_path / "export")):
        close(load_sparse(source, compute="sparse")(ids).logits, expected)
        model = load_sparse(source, compute="sparse", dtype=torch.bfloat16)
        assert {layer.packed_values.dtype for layer in packed_layers(model).values()} == {torch.bfloat16}
    # an option that the config takes, and allocation "global", go by way of the model to train on
    assert packed_layers(load_sparse(tmp_path / "export", compute="sparse", use_cache=False))
    assert packed_layers(load_sparse(exported(tmp_path / "global", tiny_llama, allocation="global"), compute="sparse"))
    assert not packed_layers(load_sparse(tmp_path / "export", compute="dense"))


def test_no_weight_is_dense_while_a_packed_directory_is_loaded(tmp_path, monkeypatch):
    directory = exported(tmp_path, tiny_llama)
    for kind, name in ((LinkedLayer, "attach"), (PackedLayer, "weight")):
        monkeypatch.setattr(kind, name, None)
    monkeypatch.setattr("hf_chts.export.packed_loading.unpack_weight", None)
    assert packed_layers(load_sparse(directory, compute="sparse"))


def test_memory_is_that_of_the_file(tmp_path):
    directory = exported(tmp_path, lambda: tiny_llama(hidden_size=256, intermediate_size=1024).bfloat16(), sparsity=0.9)
    model = load_sparse(directory, compute="sparse")
    tensors = {id(tensor): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    file = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert sum(tensors.values()) < 1.1 * file


def test_it_is_neither_trained_nor_saved(tmp_path):
    model = load_sparse(exported(tmp_path, tiny_llama), compute="sparse")
    for change in (
        model.train,
        model.model.train,
        model.model.layers[1].mlp.train,
        model.model.layers[0].mlp.up_proj.train,
        lambda: model.save_pretrained(tmp_path / "saved"),
        lambda: export_sparse(model, tmp_path / "saved"),
        lambda: sparsify(model, SparsityConfig("set")),
    ):
        with pytest.raises(ValueError, match="packed for inference.*load_sparse"):
            change()
        assert not any(module.training for module in model.modules())
    assert not (tmp_path / "saved").exists()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    twin = copy.deepcopy(model)
    twin.eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    ids = torch.randint(0, 90, (1, 4))
    for other in (twin, torch.load(file, weights_only=False)):
        assert other(ids).logits.equal(model(ids).logits)
        with pytest.raises(ValueError, match="packed for inference"):
            other.train()
    other.load_state_dict(model.state_dict())


def test_damage_is_named(tmp_path):
    directory = exported(tmp_path, tiny_llama, packed=False)
    weights = load_file(directory / "model.safetensors")
    weight = weights["model.layers.1.mlp.up_proj.weight"]
    weight[weight == 0] = 1.0
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / CHECKSUMS_NAME).unlink()
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj has weights off its mask"):
        load_sparse(directory, compute="sparse")
    with pytest.raises(ValueError, match="compute is 'fast'"):
        load_sparse(directory, compute="fast")


def test_a_pipeline_and_a_compiled_model(tmp_path):
    directory = exported(tmp_path, tiny_llama)
    words = {word: number for number, word in enumerate(["end", *"abcdefgh"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "end")), eos_token="end")
    told = []
    for model in (load_sparse(directory, compute="sparse"), AutoModelForCausalLM.from_pretrained(directory)):
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        told.append(write("b", max_new_tokens=6, do_sample=False, return_tensors=True)[0]["generated_token_ids"])
        static = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
        ids = torch.tensor([[3, 4]])
        told.append(model.generate(ids, attention_mask=torch.ones_like(ids), **static).tolist())
    assert told[:2] == told[2:]
    model = load_sparse(directory, compute="sparse")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(ids, use_cache=False).logits, model(ids).logits)
    assert json.loads((directory / "config.json").read_text())["quantization_config"]["quant_method"] == "hf_chts"

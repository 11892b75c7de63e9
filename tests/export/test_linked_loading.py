"""load_sparse fills slots weight by weight: as if the model had been dense first, which it never is."""

from unittest import mock

import pytest
import torch
from architecture_trainer import trainer
from cases import arguments, case_config
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, random_blocks, tiny_llama
from tiny_architectures import ARCHITECTURES
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_chts import SparseTrainer, SparsityConfig, SparsityHandle, export_sparse, load_sparse, sparsify
from hf_chts.export import loading
from hf_chts.export.checksums import CHECKSUMS_NAME
from hf_chts.layers.linked_layer import LinkedLayer
from hf_chts.layers.packed_model import packed_layers


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=4))


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))


def tied():
    return tiny_llama(tie_word_embeddings=True, dtype=torch.bfloat16)


@pytest.fixture
def dense_layers():
    """How many dense weights were turned into slots."""
    with mock.patch.object(LinkedLayer, "slot_values", autospec=True, side_effect=LinkedLayer.slot_values) as calls:
        yield calls


def exported(directory, build, packed, case="chtss"):
    torch.manual_seed(0)
    model = build()
    sparsify(model, case_config(case, storage="links"))
    return export_sparse(model, directory, packed=packed)


def tensors(model):
    return model.state_dict(), dict(model.named_parameters()), dict(model.named_buffers())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("build", [gpt2, t5, tied])  # give weights that are missing from files new numbers
def test_packed_for_inference(tmp_path, build, packed):
    directory = exported(tmp_path, build, packed)
    expected, found = load_sparse(directory), load_sparse(directory, compute="sparse")
    assert len(packed_layers(found)) == len(SparsityHandle.of(expected).layers)
    for name, layer in packed_layers(found).items():
        assert layer.weight.equal(expected.get_submodule(name).weight)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("build", [tiny_llama, gpt2, t5, tied])
def test_as_if_it_had_been_dense(tmp_path, monkeypatch, build, packed, dense_layers):
    directory = exported(tmp_path, build, packed)
    dense_layers.reset_mock()
    loaded = load_sparse(directory)
    assert not dense_layers.called
    monkeypatch.setattr(loading, "_can_fill_slots", lambda *_: False)
    expected = load_sparse(directory)
    assert dense_layers.called
    for one, other in (
        (loaded.state_dict(), expected.state_dict()),
        (dict(loaded.named_buffers()), dict(expected.named_buffers())),
    ):
        assert one.keys() == other.keys()
        assert not [name for name in one if not one[name].equal(other[name])]
    assert type(loaded) is type(expected)
    assert loaded.config.to_dict() == expected.config.to_dict()
    assert loaded.generation_config.to_dict() == expected.generation_config.to_dict()
    for model in (loaded, expected):
        assert not getattr(model, "is_quantized", False)
        assert not hasattr(model, "hf_quantizer")
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert SparsityHandle.of(loaded).config == SparsityHandle.of(expected).config
    SparsityHandle.of(loaded).check()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("initial_weights", ["swi", "kaiming"])
def test_new_weights_are_for_new_models_alone(tmp_path, packed, initial_weights):
    model = tiny_llama()
    sparsify(model, SparsityConfig("set", sparsity=0.8, storage="links", initial_weights=initial_weights))
    for name, value in load_sparse(export_sparse(model, tmp_path, packed=packed)).state_dict().items():
        assert value.equal(model.state_dict()[name]), name


@pytest.mark.parametrize("packed", [False, True])
def test_in_another_dtype(tmp_path, packed):
    directory = exported(tmp_path, tiny_llama, packed)
    for layer in SparsityHandle.of(load_sparse(directory, dtype=torch.bfloat16)).layers.values():
        assert layer.link_values.dtype == torch.bfloat16
        assert layer.link_positions.dtype == torch.int32
    assert load_sparse(directory, use_cache=False).config.use_cache is False  # an option that the config takes
    given = LlamaConfig.from_pretrained(directory)
    loaded = load_sparse(directory, config=given)
    assert SparsityHandle.of(loaded).links() == SparsityHandle.of(load_sparse(directory)).links()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "llava", "vit"])
def test_weights_that_are_stored_under_other_names(tmp_path, name, packed):
    """…or in other pieces: of a plain export they are made dense first."""
    architecture = ARCHITECTURES[name]
    model = architecture.model(seed=3)
    sparse = sparsify(model, SparsityConfig("set", storage="links", target_modules=architecture.target_modules))
    loaded = load_sparse(export_sparse(model, tmp_path, packed=packed))
    for name, layer in SparsityHandle.of(loaded).layers.items():
        assert layer.weight.equal(sparse.layers[name].weight)
        assert layer.link_positions.equal(sparse.layers[name].link_positions)
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].equal(value)


def test_weights_off_the_mask_are_refused(tmp_path):
    directory = exported(tmp_path, tiny_llama, packed=False)
    weights = load_file(directory / "model.safetensors")
    weight = weights["model.layers.1.mlp.up_proj.weight"]
    weight[weight == 0] = 1.0
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / CHECKSUMS_NAME).unlink()
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj has weights off its mask"):
        load_sparse(directory)


def test_it_trains_on(tmp_path):
    directory = exported(tmp_path / "export", tiny_llama, packed=True)
    found = []
    for config in (None, {"storage": "masked"}):
        model = load_sparse(directory)
        if config:
            plain, masks = model, SparsityHandle.of(model).masks()
            SparsityHandle.of(model).unsparsify()
            sparsify(plain, case_config("chtss", storage="masked"), masks=masks)
        run = SparseTrainer(
            model=model,
            args=arguments(tmp_path / str(config), optim="adamw_torch", max_grad_norm=0.0),
            train_dataset=random_blocks(),
        )
        run.train()
        found.append({name: layer.weight.detach() for name, layer in run.sparse.layers.items()})
    assert not [name for name in found[0] if not found[0][name].equal(found[1][name])]


@pytest.mark.parametrize("name", ["mixtral", "vit", "t5"])
def test_a_checkpoint_and_what_save_model_writes(tmp_path, name):
    run = trainer(name, tmp_path, "set", config={"storage": "links"}, save_strategy="steps", save_steps=12)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    for directory in (tmp_path / "checkpoint-12", tmp_path / "saved"):
        loaded = load_sparse(directory)
        for name, layer in SparsityHandle.of(loaded).layers.items():
            assert layer.weight.equal(run.sparse.layers[name].weight), name
        SparsityHandle.of(loaded).check()
    plain = type(run.model).from_pretrained(tmp_path / "saved")
    for name, layer in run.sparse.layers.items():
        assert plain.get_submodule(name).weight.equal(layer.weight), name
    with pytest.raises(ValueError, match="checkpoint of a run with storage links"):
        load_sparse(tmp_path / "checkpoint-12", use_cache=False)

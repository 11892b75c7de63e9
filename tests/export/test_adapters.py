"""Exports of models with PEFT adapters: plain loading gives the right model, and the live one does not change."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from tiny import VOCABULARY, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, set_seed

from hf_chts import SparsityConfig, SparsityHandle, export_sparse, load_sparse, sparsify
from hf_chts.export import pack_directory, push_directory

IDS = torch.arange(30).view(2, 15) % VOCABULARY
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
ADAPTED = [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(2) for kind in "qv"]


def sparse_llama(**changes):
    model = tiny_llama(**changes)
    sparsify(model, SparsityConfig(method="static", sparsity=0.8))
    return model.eval()


def trained(model):
    """With adapters as after training: LoRA's second matrix starts at 0."""
    set_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.2)
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    return model.eval()


def with_lora(model, **changes):
    return trained(get_peft_model(model, LoraConfig(**(LORA | changes))))


def with_added_adapter(model, **changes):
    model.add_adapter(LoraConfig(**(LORA | changes)))
    return trained(model)


KINDS = {
    "get_peft_model": with_lora,
    "add_adapter": with_added_adapter,
    "compiled": lambda model: torch.compile(with_lora(model), backend="eager"),
    "DoRA": lambda model: with_lora(model, use_dora=True),
    "all layers and the embeddings": lambda model: with_lora(
        model, target_modules=["q_proj", "k_proj", "up_proj", "down_proj", "embed_tokens"]
    ),
    "modules_to_save": lambda model: with_lora(model, modules_to_save=["lm_head", "down_proj"]),
}


def logits(model):
    with torch.no_grad():
        return getattr(model, "_orig_mod", model)(input_ids=IDS).logits  # without compiling, which takes long


def loaded(directory):
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_merged(tmp_path, kind, caplog):
    base = sparse_llama()
    sparse = SparsityHandle.of(base)
    before = sparse.sparsity()
    masks = {name: mask.clone() for name, mask in sparse.masks().items()}
    model = KINDS[kind](base)
    weights, live = snapshot(model), logits(model)
    with caplog.at_level(logging.WARNING):
        export_sparse(model, tmp_path / "plain", adapters="merge")
    plain = loaded(tmp_path / "plain")
    torch.testing.assert_close(logits(plain), live, rtol=1e-4, atol=1e-5)
    assert load_file(tmp_path / "plain/model.safetensors").keys() == tiny_llama().state_dict().keys()
    # the live model did not change
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())
    assert logits(model).equal(live)
    assert SparsityHandle.of(model) is sparse
    # masks, log and model card agree with the weights
    again = load_sparse(tmp_path / "plain")
    found = SparsityHandle.of(again)
    for name, mask in found.masks().items():
        assert mask.equal(masks[name] | plain.get_parameter(f"{name}.weight").ne(0)), name
        assert mask.all() or mask.equal(masks[name])
    assert found.sparsity() < before
    assert f"sparsity falls from {before:.2%} to {found.sparsity():.2%}" in caplog.text
    assert f"{found.sparsity():.2%}" in (tmp_path / "plain/README.md").read_text()
    # as PEFT merges, to the bit
    reference = model.merge_and_unload() if hasattr(model, "merge_and_unload") else None
    if reference is not None:
        for name, value in reference.state_dict().items():
            assert value.equal(plain.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["get_peft_model", "add_adapter"])
def test_merged_on_links_alone(tmp_path, kind, caplog):
    base = sparse_llama()
    masks = {name: mask.clone() for name, mask in SparsityHandle.of(base).masks().items()}
    links = {name: layer.weight.detach().clone() for name, layer in SparsityHandle.of(base).layers.items()}
    model = KINDS[kind](base)
    live = logits(model)
    with caplog.at_level(logging.WARNING):
        export_sparse(model, tmp_path, adapters="merge_masked")
    found = load_sparse(tmp_path)
    assert SparsityHandle.of(found).masks().keys() == masks.keys()
    change, dropped = 0.0, 0.0
    modules = dict(model.named_modules())
    prefix = "base_model.model." if kind == "get_peft_model" else ""
    for name, mask in masks.items():
        weight = found.get_parameter(f"{name}.weight")
        assert SparsityHandle.of(found).masks()[name].equal(mask)
        if name not in ADAPTED:
            assert weight.equal(links[name])
            continue
        lora = modules[prefix + name]
        adapter = lora.active_adapters[0]
        delta = 16 / 4 * (lora.lora_B[adapter].weight @ lora.lora_A[adapter].weight).detach()
        torch.testing.assert_close(weight, (links[name] + delta) * mask)
        change += float(delta.square().sum())
        dropped += float(delta[~mask].square().sum())
    assert f"{(dropped / change) ** 0.5:.1%} of what they add" in caplog.text
    # the live model did not change
    assert logits(model).equal(live)
    assert not torch.allclose(logits(found.eval()), live, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_left_out(tmp_path, kind):
    base = sparse_llama()
    expected = logits(base)
    model = KINDS[kind](base)
    live = logits(model)
    assert not live.equal(expected)
    export_sparse(model, tmp_path, adapters="leave_out")
    assert logits(loaded(tmp_path)).equal(expected)
    assert logits(model).equal(live)


@pytest.mark.parametrize("kind", ["get_peft_model", "add_adapter", "compiled"])
def test_refused_without_a_choice(tmp_path, kind):
    model = KINDS[kind](sparse_llama())
    for packed in (False, True):
        with pytest.raises(ValueError, match="has PEFT adapters.*adapters='merge'.*'merge_masked'.*'leave_out'"):
            export_sparse(model, tmp_path / "x", packed=packed)
    with pytest.raises(ValueError, match="adapters is 'dense'; choose one of"):
        export_sparse(model, tmp_path / "x", adapters="dense")
    with pytest.raises(ValueError, match="state_dict cannot be used for a model with PEFT"):
        export_sparse(model, tmp_path / "x", adapters="merge", state_dict={})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("adapters", ["merge", "merge_masked"])
def test_packed(tmp_path, adapters):
    model = with_lora(sparse_llama())
    export_sparse(model, tmp_path / "plain", adapters=adapters)
    export_sparse(model, tmp_path / "packed", adapters=adapters, packed=True)
    plain, packed = load_sparse(tmp_path / "plain"), load_sparse(tmp_path / "packed")
    assert all(value.equal(packed.state_dict()[name]) for name, value in plain.state_dict().items())
    for name, mask in SparsityHandle.of(plain).masks().items():
        assert mask.equal(SparsityHandle.of(packed).masks()[name])


def test_an_adapter_that_is_not_trained_changes_nothing(tmp_path, caplog):
    base = sparse_llama()
    sparsity = SparsityHandle.of(base).sparsity()
    expected = logits(base)
    with caplog.at_level(logging.WARNING):
        export_sparse(get_peft_model(base, LoraConfig(**LORA)), tmp_path, adapters="merge")
    assert f"falls from {sparsity:.2%} to {sparsity:.2%}" in caplog.text
    assert logits(loaded(tmp_path)).equal(expected)


def test_conv1d(tmp_path):
    set_seed(0)
    config = GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=32)
    base = GPT2LMHeadModel(config).eval()
    sparsify(base, SparsityConfig(method="static", sparsity=0.8))
    model = trained(get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)))
    live = logits(model)
    export_sparse(model, tmp_path, adapters="merge")
    torch.testing.assert_close(logits(loaded(tmp_path)), live, rtol=1e-4, atol=1e-5)
    masks = SparsityHandle.of(load_sparse(tmp_path)).masks()
    assert masks["transformer.h.0.attn.c_attn"].all()
    assert not masks["transformer.h.0.mlp.c_fc"].all()


def test_merged_adapters(tmp_path):
    model = with_lora(sparse_llama())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters of .*q_proj are merged into its weight.*unmerge_adapter"):
        export_sparse(model, tmp_path, adapters="merge")


@pytest.mark.parametrize("kind", ["get_peft_model", "add_adapter", "compiled", "modules_to_save"])
def test_disabled_adapters(tmp_path, kind):
    base = sparse_llama()
    expected = logits(base)
    model = KINDS[kind](base)
    inside = getattr(model, "_orig_mod", model)

    def exports():
        for adapters in ("merge", "merge_masked"):
            with pytest.raises(
                ValueError, match=rf"adapters is '{adapters}', but the adapters of .* are disabled.*leave_out"
            ):
                export_sparse(model, tmp_path / "x", adapters=adapters)
        assert not (tmp_path / "x").exists()
        export_sparse(model, tmp_path / "left out", adapters="leave_out")
        assert logits(loaded(tmp_path / "left out")).equal(expected)

    if kind == "add_adapter":
        inside.disable_adapters()
        exports()
        inside.enable_adapters()
    else:
        with inside.disable_adapter():
            exports()
    export_sparse(model, tmp_path / "merged", adapters="merge")
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "patterns"),
    [("get_peft_model", None), ("add_adapter", ["q_proj", "up_proj"]), ("DoRA", [r"model\.layers\.1\..*"])],
)
def test_what_adapters_add_stays_dense(tmp_path, kind, patterns):
    config = SparsityConfig(method="static", sparsity=0.8, target_modules=patterns)
    names = list(sparsify(tiny_llama(), config).layers)
    model = KINDS[kind](tiny_llama())
    model.requires_grad_(True)
    assert list(sparsify(model, config).layers) == names
    assert all(p.ne(0).all() for name, p in model.named_parameters() if "lora_" in name)
    export_sparse(model.eval(), tmp_path, adapters="merge")
    torch.testing.assert_close(logits(loaded(tmp_path)), logits(model), rtol=1e-4, atol=1e-5)
    assert list(SparsityHandle.of(load_sparse(tmp_path)).layers) == names


@pytest.mark.parametrize("pattern", ["lora_A.default", r".*\.lora_[AB]\..*", "default"])
def test_adapters_are_not_targets(pattern):
    model = with_lora(tiny_llama()).requires_grad_(True)
    with pytest.raises(ValueError, match=r"only what PEFT's adapters have put into the model.*lora_A\.default"):
        sparsify(model, SparsityConfig(target_modules=["up_proj", pattern]))
    assert SparsityHandle.of(model) is None


def test_a_layer_whose_copy_runs_is_not_a_target():
    model = with_lora(tiny_llama(), modules_to_save=["down_proj"]).requires_grad_(True)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj has a copy.*modules_to_save"):
        sparsify(model, SparsityConfig())
    others = SparsityConfig(method="static", target_modules=["q_proj", "up_proj"])
    assert len(sparsify(model, others).layers) == 4


def test_prompt_tuning_has_nothing_to_merge(tmp_path):
    base = sparse_llama()
    expected = logits(base)
    model = get_peft_model(base, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    with pytest.raises(ValueError, match="has PEFT adapters"):
        export_sparse(model, tmp_path / "x")
    with pytest.raises(ValueError, match="add tokens to its input.*leave_out"):
        export_sparse(model, tmp_path / "x", adapters="merge")
    export_sparse(model, tmp_path, adapters="leave_out")
    assert logits(loaded(tmp_path)).equal(expected)


def test_tied_weights_that_an_adapter_unties(tmp_path):
    model = with_lora(sparse_llama(tie_word_embeddings=True), target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match="lm_head.weight or model.embed_tokens.weight, which the config ties"):
        export_sparse(model, tmp_path / "x", adapters="merge")
    assert not (tmp_path / "x").exists()
    tied = with_lora(sparse_llama(tie_word_embeddings=True))
    export_sparse(tied, tmp_path, adapters="merge")
    torch.testing.assert_close(logits(loaded(tmp_path)), logits(tied), rtol=1e-4, atol=1e-5)


def test_directories_that_hold_an_adapter_are_refused(tmp_path):
    with_lora(sparse_llama()).save_pretrained(tmp_path)
    for use in (
        load_sparse,
        lambda path: pack_directory(path, tmp_path / "x"),
        lambda path: push_directory(path, "a/b"),
    ):
        with pytest.raises(ValueError, match="holds a PEFT adapter, not a model.*export_sparse"):
            use(tmp_path)


def test_copies_of_sparse_layers_are_checked_and_reverted(tmp_path):
    base = sparse_llama()
    sparse = SparsityHandle.of(base)
    model = with_lora(base, modules_to_save=["down_proj"])
    assert list(sparse.copies()) == [f"model.layers.{i}.mlp.down_proj.modules_to_save.default" for i in range(2)]
    sparse.check()
    copy = sparse.copies()["model.layers.1.mlp.down_proj.modules_to_save.default"]
    with torch.no_grad():
        copy.weight.add_(~copy.mask * 1.0)
    with pytest.raises(RuntimeError, match="layers.1.mlp.down_proj.modules_to_save.default is not 0 off its mask"):
        sparse.check()
    copy.set_mask(copy.topology)
    sparse.unsparsify()
    assert not [m for m in model.modules() if type(m).__name__.startswith("Masked")]
    assert all(type(m) is not nn.Linear or not hasattr(m, "mask") for m in model.modules())


def test_an_export_has_the_config_of_a_plain_model(tmp_path):
    export_sparse(with_added_adapter(sparse_llama()), tmp_path, adapters="merge")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "masks.safetensors", "sparsity_config.json", "README.md"} <= names
    assert not [name for name in names if "adapter" in name]
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]

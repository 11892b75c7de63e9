"""Adapters on the links alone: what they compute, their gradients, and what merging makes of them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import VOCABULARY, tiny_llama
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_chts import SparsityConfig, SparsityHandle, export_sparse, load_sparse, sparsify
from hf_chts.fine_tuning.masked_lora import MaskedLora, masked

IDS = torch.arange(30).view(2, 15) % VOCABULARY


def adapted(model, storage, **changes):
    sparse = sparsify(model, SparsityConfig(method="static", sparsity=0.8, storage=storage))
    settings = {"r": 4, "lora_alpha": 12, "target_modules": list(sparse.layers), "task_type": "CAUSAL_LM"}
    peft = get_peft_model(model, masked(LoraConfig(**(settings | changes))))
    set_seed(3)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return peft, sparse


def gpt2():
    set_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=32))


MODELS = {"linear": tiny_llama, "conv1d": gpt2}


@pytest.mark.parametrize("storage", ["masked", "links"])
@pytest.mark.parametrize("kind", MODELS)
def test_merging_keeps_mask_and_function(kind, storage, tmp_path):
    peft, sparse = adapted(MODELS[kind](), storage)
    before = {name: mask.clone() for name, mask in sparse.masks().items()}
    peft.eval()
    with torch.no_grad():
        live = peft(input_ids=IDS).logits
        with peft.disable_adapter():
            assert not torch.allclose(peft(input_ids=IDS).logits, live, atol=1e-3)
    for adapters in ("merge_masked", "merge"):
        export_sparse(peft, tmp_path / adapters, adapters=adapters)
        merged = load_sparse(tmp_path / adapters).eval()
        with torch.no_grad():
            torch.testing.assert_close(merged(input_ids=IDS).logits, live, rtol=1e-4, atol=1e-5)
        found = SparsityHandle.of(merged).masks()
        assert all(mask.equal(found[name]) for name, mask in before.items())


@pytest.mark.parametrize("storage", ["masked", "links"])
@pytest.mark.parametrize("kind", MODELS)
def test_merging_in_place_as_peft_does_it(kind, storage):
    peft, sparse = adapted(MODELS[kind](), storage)
    peft.eval()
    with torch.no_grad():
        live = peft(input_ids=IDS).logits
        peft.merge_adapter()
        torch.testing.assert_close(peft(input_ids=IDS).logits, live, rtol=1e-4, atol=1e-5)
        with peft.disable_adapter():
            assert not torch.allclose(peft(input_ids=IDS).logits, live, atol=1e-3)
        peft.merge_adapter()
        peft.unmerge_adapter()
        torch.testing.assert_close(peft(input_ids=IDS).logits, live, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="leave adapter_names out"):
            peft(input_ids=IDS, adapter_names=["default", "default"])
        merged = peft.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(merged(input_ids=IDS).logits, live, rtol=1e-4, atol=1e-5)
    assert SparsityHandle.of(merged).links() == sum(int(mask.sum()) for mask in sparse.masks().values())


@pytest.mark.parametrize("storage", ["masked", "links"])
def test_gradients(storage):
    """As autograd has them for a weight W + (B·A)⊙M, written out."""
    peft, sparse = adapted(tiny_llama(), storage)
    name, layer = next((n, m) for n, m in peft.named_modules() if isinstance(m, MaskedLora))
    inside = layer.get_base_layer()
    x = torch.randn(7, inside.in_features, generator=torch.Generator().manual_seed(0))
    target = torch.randn(7, inside.out_features, generator=torch.Generator().manual_seed(1))
    (layer(x) * target).sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    mask = sparse.masks()[name.removeprefix("base_model.model.")].double()
    weight = inside.weight.detach().double()
    a64, b64 = (p.detach().double().requires_grad_() for p in (a, b))
    (functional.linear(x.double(), weight + 3 * (b64 @ a64) * mask) * target).sum().backward()
    torch.testing.assert_close(a.grad.double(), a64.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.grad.double(), b64.grad, rtol=1e-4, atol=1e-4)
    assert all(not p.requires_grad for p in inside.parameters())


def test_other_layers_have_ordinary_adapters():
    peft, _ = adapted(tiny_llama(), "masked", target_modules=["q_proj", "lm_head"])
    kinds = {name.rpartition(".")[2]: type(m) for name, m in peft.named_modules() if hasattr(m, "lora_A")}
    assert kinds["q_proj"] is MaskedLora
    assert kinds["lm_head"] is not MaskedLora

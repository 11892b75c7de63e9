"""Nothing that is not finite is exported or packed, and the refusal names it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import with_lora
from tiny import tiny_llama

from hf_chts import SparsityConfig, SparsityHandle, export_sparse, sparsify
from hf_chts.export import pack_directory
from hf_chts.finite import not_finite

LAYER = "model.layers.1.mlp.up_proj"


def sparse_llama(dtype=torch.float32):
    model = tiny_llama().to(dtype)
    sparsify(model, SparsityConfig())
    return model


def link(model):
    return tuple(SparsityHandle.of(model).layers[LAYER].mask.nonzero()[3])


def off(model):
    return tuple((~SparsityHandle.of(model).layers[LAYER].mask).nonzero()[3])


# where a value is not finite: the name in the error, and the position in that tensor
PLACES = {
    "a link": (f"{LAYER}.weight", link),
    "off the mask": (f"{LAYER}.weight", off),  # where clipping by a norm of NaN puts it
    "a dense layer": ("lm_head.weight", lambda model: (0, 1)),
    "a norm": ("model.norm.weight", lambda model: (39,)),
    "embeddings": ("model.embed_tokens.weight", lambda model: (5, 5)),
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("where", PLACES)
def test_export(tmp_path, where, given):
    name, place = PLACES[where]
    model = sparse_llama(torch.bfloat16 if given else torch.float32)
    weight = model.get_parameter(name).data
    for value, packed in ((torch.nan, False), (torch.inf, True), (-torch.inf, False)):
        weight[place(model)] = value
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()} if given else None
        with pytest.raises(FloatingPointError, match=f"^there is NaN or infinity in {name}, so nothing is exported"):
            export_sparse(model, tmp_path / "x", packed=packed, state_dict=state)
    assert not any(tmp_path.iterdir())
    weight[place(model)] = 0
    export_sparse(model, tmp_path / "x")


def test_an_earlier_export_stays(tmp_path):
    model = sparse_llama()
    export_sparse(model, tmp_path / "x")
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    model.lm_head.weight.data[0] = float("nan")
    for packed in (False, True):
        with pytest.raises(FloatingPointError, match="lm_head.weight"):
            export_sparse(model, tmp_path / "x", packed=packed)
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before


def test_what_adapters_add(tmp_path):
    model = with_lora(sparse_llama())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(1e30)  # finite, but their product is not
    for adapters in ("merge", "merge_masked"):
        with pytest.raises((FloatingPointError, ValueError), match="NaN"):  # PEFT itself looks at some
            export_sparse(model, tmp_path / "x", adapters=adapters)
    assert not any(tmp_path.iterdir())
    export_sparse(model, tmp_path / "x", adapters="leave_out")


@pytest.mark.parametrize("where", ["a link", "a dense layer"])
def test_packing_a_directory(tmp_path, where):
    name, place = PLACES[where]
    model = sparse_llama()
    plain = export_sparse(model, tmp_path / "plain")
    tensors = load_file(plain / "model.safetensors")
    tensors[name][place(model)] = float("nan")
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    (plain / "weights_checksums.json").unlink()
    with pytest.raises(ValueError, match=f"model.safetensors: there is NaN or infinity in {name}:"):
        pack_directory(plain, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
    shutil.rmtree(plain)


def test_which_tensors_by_hand():
    nan, infinity = float("nan"), float("inf")
    tensors = {
        "nan": torch.tensor([[1.0, nan], [0, 0]]),
        "finite": torch.ones(3, 2),
        "minus infinity": torch.tensor([-infinity, 1], dtype=torch.bfloat16),
        "integers": torch.tensor([1, 2]),
        "nothing": torch.empty(0, 4),
        "float8": torch.tensor([1.0, nan]).to(torch.float8_e4m3fn),
        "complex": torch.tensor([complex(0, infinity)]),
        "the largest half": torch.tensor([65504.0, -65504.0], dtype=torch.float16),
        "more than the largest half": torch.tensor([65504.0, infinity], dtype=torch.float16),
        "the largest float": torch.tensor([torch.finfo(torch.float32).max, torch.finfo(torch.float32).min]),
        "no data": torch.empty(2, device="meta"),
        "a number": torch.tensor(nan),
    }
    expected = ["nan", "minus infinity", "float8", "complex", "more than the largest half", "a number"]
    assert not_finite(tensors) == expected
    assert not_finite({}) == []


def test_a_buffer_may_mask_with_minus_infinity(tmp_path):
    model = sparse_llama()
    model.register_buffer("future", torch.full((4, 4), -torch.inf).triu(1))
    export_sparse(model, tmp_path / "export")
    model.future[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="future"):
        export_sparse(model, tmp_path / "again")
    assert not (tmp_path / "again").exists()

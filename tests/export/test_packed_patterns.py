"""Packed exports under a pattern: a smaller index, the same masks and weights, and what is damaged is refused."""

import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import VOCABULARY, tiny_llama
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_chts import SparsityConfig, SparsityHandle, export_sparse, load_sparse, sparsify
from hf_chts.export import pack_directory, packed_index, unpack_directory
from hf_chts.topology.bits import pack_bits
from hf_chts.topology.patterns import Pattern, pattern_of, under_pattern
from hf_chts.topology.random_streams import random_stream

IDS = torch.arange(30).view(2, 15) % VOCABULARY


def network(shape, links, pattern, transposed=False):
    rows, columns = shape[::-1] if transposed else shape
    drawn = torch.rand(rows, columns, generator=random_stream(*shape, links)) < links / (rows * columns)
    mask = under_pattern(drawn, pattern, links, 1)
    return mask.t() if transposed else mask


def test_groups_by_hand():
    # choices of 2 of 4 in order: 01 02 03 12 13 23, so that these groups are numbers 0, 5 and 4 to the base 6
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1, 0, 1, 0, 1]], dtype=torch.bool)
    claimed = packed_index.header((1, 12), 6, Pattern(2, 4), False)
    assert claimed == (1, 12)  # a word has more bytes than twelve bits
    index = packed_index.packed_index(mask, (1, 12, 2, 4, 1))
    assert index.tolist() == [0 + 6 * 5 + 36 * 4, *[0] * 7]
    assert packed_index.index_bits(index, (1, 12, 2, 4, 1), 6).equal(pack_bits(mask))


def test_positions_by_hand():
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask.view(-1)[[1, 6, 15]] = True
    claimed = (2, 8, 2, 0, 0)
    # lower two bits 01 10 11, from the lowest; the rest 0, 1, 3 as 1 0 1 0 0 1
    assert packed_index.packed_index(mask, claimed).tolist() == [0b111001, 0b100101]
    assert packed_index.index_bits(torch.tensor([0b111001, 0b100101], dtype=torch.uint8), claimed, 3).equal(
        pack_bits(mask)
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("name", "sparsity", "bits_a_weight"),
    [("2:4", 0.5, 2 / 3), ("1:4", 0.75, 0.52), ("4:8", 0.5, 0.81), ("2:3", 1 / 3, 0.55), ("fan_in", 0.8, 0.86),
     ("fan_in", 0.9, 0.53), ("fan_in", 0.95, 0.32), ("fan_in", 0.99, 0.087), ("fan_in", 0.999, 0.023)],
)  # fmt: skip
def test_every_index(name, sparsity, bits_a_weight, transposed):
    pattern, shape = pattern_of(name), (96, 1200)
    links = round(math.prod(shape) * (1 - sparsity))
    mask = network(shape, links, pattern, transposed)
    claimed = packed_index.header(shape, links, pattern, transposed)
    packed_index.check(claimed)
    index = packed_index.packed_index(mask, claimed)
    assert len(index) == packed_index.size(claimed, links)
    assert 8 * len(index) / math.prod(shape) <= bits_a_weight
    assert packed_index.index_bits(index, claimed, links).equal(pack_bits(mask.contiguous()))


@pytest.mark.parametrize(("name", "sparsity"), [("fan_in", 0.5), ("fan_in", 0.7), ("8:16", 0.5), ("10:20", 0.5)])
def test_bits_where_nothing_is_smaller(name, sparsity):
    shape = (64, 320)
    assert packed_index.header(shape, round(64 * 320 * (1 - sparsity)), pattern_of(name), False) == shape


def test_blocks_of_links(monkeypatch):
    monkeypatch.setattr(packed_index, "_BLOCK", 8)
    mask = network((31, 37), 101, Pattern())
    claimed = packed_index.header((31, 37), 101, Pattern(), False)
    index = packed_index.packed_index(mask, claimed)
    assert packed_index.index_bits(index, claimed, 101).equal(pack_bits(mask))


def test_damage():
    shape, links = (32, 96), 32 * 48
    groups = packed_index.header(shape, links, Pattern(2, 4), False)
    index = packed_index.packed_index(network(shape, links, Pattern(2, 4)), groups)
    index[7] = 0xFF
    with pytest.raises(ValueError, match="an index that is damaged"):
        packed_index.index_bits(index, groups, links)
    with pytest.raises(ValueError, match="does not have 2 links in every group of 4"):
        packed_index.packed_index(torch.ones(shape, dtype=torch.bool), groups)
    positions = packed_index.header(shape, 300, Pattern(), False)
    index = packed_index.packed_index(network(shape, 300, Pattern()), positions)
    for place in range(len(index)):
        for bit in (1, 128):
            broken = index.clone()
            broken[place] ^= bit
            try:  # another mask with as many links, or refused; never something else
                found = packed_index.index_bits(broken, positions, 300)
            except ValueError:
                continue
            assert found.shape == ((32 * 96 + 7) // 8,)
    for bad in [(4, 4, 4), (4, 8, 2, 17, 1), (4, 8, 3, 3, 1), (4, 8, 2, 4, 2), (4, 7, 2, 4, 1), (4, 4, 0, 0, 0),
                (4, 4, 7, 0, 0), (4, 4, -1, 0, 0), (4, 4, 3, 0, 1)]:  # fmt: skip
        with pytest.raises(ValueError, match="a shape of"):
            packed_index.check(bad)


@pytest.mark.parametrize("storage", ["masked", "links"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("pattern", ["fan_in", "2:4"])
def test_exports(tmp_path, pattern, architecture, storage):
    gpt2 = GPT2Config(vocab_size=VOCABULARY, n_embd=96, n_layer=1, n_head=2, n_positions=32)
    model = (tiny_llama(hidden_size=96) if architecture == "llama" else GPT2LMHeadModel(gpt2)).eval()
    handle = sparsify(model, SparsityConfig("chts", pattern=pattern, storage=storage))
    packed = export_sparse(model, tmp_path / "packed", packed=True)
    plain = export_sparse(model, tmp_path / "plain")
    converted = pack_directory(plain, tmp_path / "converted")
    (file,) = packed.glob("packed-*.safetensors")
    tensors, others = load_file(file), load_file(converted / file.name)
    assert tensors.keys() == others.keys()
    assert all(tensor.equal(others[key]) for key, tensor in tensors.items())
    smaller = 0
    for name, layer in handle.layers.items():
        index, numel = tensors[f"{name}.weight_bits"], math.prod(layer.storage.shape)
        assert len(index) <= (numel + 7) // 8
        smaller += len(index) < (numel + 7) // 8
    assert smaller > len(handle.layers) // 2
    again = unpack_directory(packed, tmp_path / "unpacked")
    for name in ("model.safetensors", "masks.safetensors"):
        first, second = load_file(again / name), load_file(plain / name)
        assert first.keys() == second.keys()
        assert all(tensor.equal(second[key]) for key, tensor in first.items())
    with torch.no_grad():
        expected = model(IDS).logits
        for loaded in (load_sparse(packed), AutoModelForCausalLM.from_pretrained(packed)):
            assert loaded.eval()(IDS).logits.equal(expected)
        inference = load_sparse(packed, compute="sparse")
        torch.testing.assert_close(inference(IDS).logits, expected, atol=1e-5, rtol=1e-4)
    masks = SparsityHandle.of(load_sparse(packed)).masks()
    assert all(mask.equal(masks[name]) for name, mask in handle.masks().items())


def test_without_a_pattern_the_format_is_that_of_earlier_versions(tmp_path):
    model = tiny_llama()
    sparsify(model, SparsityConfig("chts"))
    packed = export_sparse(model, tmp_path / "packed", packed=True)
    assert '"version": 1' in (packed / "config.json").read_text()
    (file,) = packed.glob("packed-*.safetensors")
    assert all(len(value) == 2 for key, value in load_file(file).items() if key.endswith("_shape"))

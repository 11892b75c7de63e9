"""Masks as bits there and back, and random streams."""

import numpy as np
import pytest
import torch

from hf_chts.topology import bits
from hf_chts.topology.bits import (
    count_bits,
    lacked_links,
    link_positions,
    pack_bits,
    pack_rows,
    unpack_bits,
)
from hf_chts.topology.random_streams import random_stream

MASK = torch.tensor([[True, False, False, True], [False] * 4, [False, False, False, True]])


@pytest.mark.parametrize("shape", [(3, 4), (1, 8), (5, 7), (0, 3), (16, 33)])
def test_bits_there_and_back(shape):
    mask = torch.rand(shape, generator=random_stream(shape[0])) < 0.5
    packed = pack_bits(mask)
    assert packed.numpy().tolist() == np.packbits(mask.numpy().ravel(), bitorder="little").tolist()
    assert unpack_bits(packed, shape).equal(mask)
    assert count_bits(packed) == int(mask.sum())
    assert pack_bits(mask.t()).equal(pack_bits(mask.t().contiguous()))


def test_link_positions():
    assert link_positions(MASK).tolist() == [0, 3, 11]
    assert link_positions(MASK.t()).tolist() == [0, 9, 11]
    assert link_positions(torch.zeros(2, 2, dtype=torch.bool)).tolist() == []


def test_count_of_every_byte():
    assert count_bits(torch.arange(256, dtype=torch.uint8)) == sum(bin(i).count("1") for i in range(256))


@pytest.fixture(params=["with NumPy's count of bits", "without"])
def either_count(request, monkeypatch):
    if request.param == "without":
        monkeypatch.delattr(np, "bitwise_count", raising=False)


@pytest.mark.usefixtures("either_count")
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200])
def test_links_that_another_row_lacks(columns, monkeypatch):
    monkeypatch.setattr(bits, "_WORDS_AT_A_TIME", 20)  # in several blocks
    mask = torch.rand(30, columns, generator=random_stream(columns)) < 0.6
    mask[0], mask[1] = True, False  # the highest bit of every word is the sign of a number
    first, second = torch.randint(30, (2, 200), generator=random_stream("pairs"))
    first[:3], second[:3] = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    expected = [int((mask[a] & ~mask[b]).sum()) for a, b in zip(first, second, strict=True)]
    share = torch.rand(200, dtype=torch.float64, generator=random_stream("share"))
    counts, found = lacked_links(pack_rows(mask), first, second, share)
    assert counts.tolist() == expected
    there = counts > 0
    first, second, found = first[there], second[there], found[there]
    assert (mask[first, found] & ~mask[second, found]).all()


@pytest.mark.usefixtures("either_count")
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200])
def test_every_link_of_a_row_is_found_by_its_number(columns):
    mask = torch.rand(30, columns, generator=random_stream(columns)) < 0.3
    mask[0], mask[1, -1] = True, True
    mask = mask[mask.any(1)]
    for row in mask:
        places = row.nonzero()[:, 0]
        share = (torch.arange(len(places), dtype=torch.float64) + 0.5) / len(places)
        rows = pack_rows(torch.stack([row, torch.zeros_like(row)]))  # the second lacks all of the first
        assert lacked_links(rows, torch.zeros_like(places), torch.ones_like(places), share)[1].equal(places)
    almost_one = torch.full((len(mask),), 1 - 2**-53, dtype=torch.float64)
    none = torch.full((len(mask),), len(mask))
    rows = pack_rows(torch.cat([mask, torch.zeros(1, columns, dtype=torch.bool)]))
    _, last = lacked_links(rows, torch.arange(len(mask)), none, almost_one)
    assert last.tolist() == [int(row.nonzero().max()) for row in mask]


def test_damaged_bits_are_refused():
    with pytest.raises(ValueError, match="takes 2 bytes"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), (3, 4))
    with pytest.raises(ValueError, match="after the 12 links"):
        unpack_bits(torch.tensor([0, 0x10], dtype=torch.uint8), (3, 4))


def test_random_streams_differ_by_any_part_of_the_key():
    draws = {
        tuple(torch.rand(4, generator=random_stream(*key)).tolist()) for key in [(0, 1), (1, 0), (0, 1, "a"), (0, "1")]
    }
    assert len(draws) == 4
    assert torch.rand(4, generator=random_stream(7, "x")).equal(torch.rand(4, generator=random_stream(7, "x")))

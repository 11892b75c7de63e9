"""The links of a layer in the order of its products."""

import numpy as np
import pytest
import torch
from sparse_cases import layer, random_mask

from hf_chts import SparsityConfig, kernels, sparsify
from hf_chts.layers import link_index
from hf_chts.layers.link_index import Direction, LinkIndex

pytest.importorskip("numba")


def expected(mask, block):
    """(columns, starts) by the definition, link by link."""
    rows, columns = mask.shape
    found, starts = [], [0]
    for first in range(0, columns, block):
        for row in range(rows):
            found += [column for column in range(first, min(columns, first + block)) if mask[row, column]]
            starts.append(len(found))
    return found, starts


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_both_directions(monkeypatch, density, transposed, numba):
    if not numba:
        monkeypatch.setattr(kernels, "available", lambda: False)
    else:
        monkeypatch.setattr(link_index, "_second_cache", lambda: 2 * 64 * 64 * 4)
    mask = random_mask(70, 130, density)
    case = layer(mask, transposed=transposed)
    for direction, links in ((case.index.forward, mask), (case.index.backward, mask.t())):
        columns, starts = expected(links.tolist() and links, direction.block)
        assert direction.starts.tolist() == starts
        assert direction.column_numbers().tolist() == columns
        assert direction.count == int(mask.sum())
        # each link has the slot that has its position
        there = case.positions[direction.slots[: direction.count].long()].long()
        rows, width = direction.shape
        turned = transposed == (direction is case.index.forward)
        at = direction.positions()
        assert there.equal(at % width * rows + at // width if turned else at)
    assert (case.index.forward.blocks > 1) == numba


def test_positions_over_two_to_the_31():
    from hf_chts.kernels.link_order import order_links

    rows = columns = 50_000
    row = torch.tensor([0, 49_999, 49_999, 43_000, 7])
    column = torch.tensor([0, 49_999, 0, 12_345, 49_999])
    positions = torch.cat([row * columns + column, torch.tensor([rows * columns])])
    assert int(positions.max()) > 2**31
    index = LinkIndex.empty(6, (rows, columns))
    blocks = (index.backward.block, index.forward.block)
    order_links(positions.numpy(), rows, columns, blocks, index.forward.arrays(), index.backward.arrays())
    for direction, mine in ((index.forward, row * columns + column), (index.backward, column * rows + row)):
        assert sorted(direction.positions().tolist()) == sorted(mine.tolist())
        assert mine[direction.slots[:5].long()].equal(direction.positions())


def test_an_update_changes_the_index_in_place():
    model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.ReLU(), torch.nn.Linear(40, 5))
    config = SparsityConfig("set", sparsity=0.8, storage="links", compute="sparse", target_modules=["0"])
    storage = sparsify(model, config).layers["0"].storage
    index, tensors = storage.index, storage.index.forward.tensors
    version = tensors[0]._version
    mask = storage.topology.roll(1, 0)
    storage.replace(mask)
    assert storage.index is index
    assert all(now is before for now, before in zip(index.forward.tensors, tensors, strict=True))
    assert tensors[0]._version > version
    assert index.forward.column_numbers().tolist() == expected(mask, index.forward.block)[0]
    assert index.version == storage.version


def test_bytes_of_an_index():
    index = LinkIndex.empty(1000, (64, 128))
    # column and slot of each link, twice, and a start for each row and column
    assert index.nbytes == 2 * 1000 * (2 + 4) + (65 + 129) * 8
    assert Direction.empty(10, (3, 70_000)).columns.dtype == torch.int32
    assert Direction.empty(10, (3, 65_536)).arrays()[0].dtype == np.uint16

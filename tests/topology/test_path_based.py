"""Scores over paths of length three: golden figures, loops over paths, hand-worked networks; ranks by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_chts.topology import path_based
from hf_chts.topology.link_prediction import ch2_l3n, ch2_l3p, ch3_1_l3n, ch3_l3p
from hf_chts.topology.rank_correlation import spearman

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "reference_scores.npz")
CASES = sorted({key.split("/")[0] for key in GOLDEN if not key.startswith("schedule")})
FUNCTIONS = {"CH2-L3p": ch2_l3p, "CH3-L3p": ch3_l3p}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "rtol"), [("CH2-L3p", 1e-10), ("CH3-L3p", 1e-10), ("CH3.1-L3n", 1e-5)])
def test_golden_figures(case, name, rtol):
    scores = (FUNCTIONS | {"CH3.1-L3n": ch3_1_l3n})[name](torch.tensor(GOLDEN[f"{case}/mask"]))
    assert scores.dtype == (torch.float32 if name == "CH3.1-L3n" else torch.float64)
    np.testing.assert_allclose(scores.numpy(), GOLDEN[f"{case}/{name}"], rtol=rtol, atol=0)


def by_paths(mask):
    """CH2-L3p and CH3-L3p from the definition, on a graph with nodes of both sides and sets of neighbours."""
    outs, ins = mask.shape
    neighbours = {("out", i): {("in", int(j)) for j in np.flatnonzero(mask[i])} for i in range(outs)}
    neighbours |= {("in", j): {("out", int(i)) for i in np.flatnonzero(mask[:, j])} for j in range(ins)}
    ch2, ch3 = np.zeros(mask.shape), np.zeros(mask.shape)
    for i in range(outs):
        for j in range(ins):
            u, v = ("out", i), ("in", j)
            if v in neighbours[u]:
                continue
            paths = [(b, a) for b in neighbours[u] for a in neighbours[b] if a != u and v in neighbours[a]]
            community = {node for path in paths for node in path}
            for path in paths:
                internal = [len(neighbours[z] & community) for z in path]
                external = [len(neighbours[z] - community - {u, v}) for z in path]
                leaving = (1 + external[0]) * (1 + external[1])
                ch3[i, j] += 1 / math.sqrt(leaving)
                ch2[i, j] += math.sqrt((1 + internal[0]) * (1 + internal[1])) / math.sqrt(leaving)
    return {"CH2-L3p": ch2, "CH3-L3p": ch3}


@pytest.mark.parametrize("shape", [(7, 11), (12, 5), (9, 9), (1, 6), (6, 1)])
@pytest.mark.parametrize("density", [0.0, 0.15, 0.4, 0.8, 1.0])
def test_random_networks_with_empty_rows_and_columns(shape, density):
    rng = np.random.default_rng(shape[0])
    mask = rng.random(shape) < density
    if min(shape) > 3 and density < 1:
        mask[2], mask[:, 3] = False, False
    expected = by_paths(mask)
    for name, function in FUNCTIONS.items():
        np.testing.assert_allclose(function(torch.tensor(mask)).numpy(), expected[name], rtol=1e-12, atol=0)
        np.testing.assert_allclose(function(torch.tensor(mask.T)).numpy(), expected[name].T, rtol=1e-12, atol=0)


def test_one_path_by_hand():
    # out 0 - in 0 - out 1 - in 1, and out 1 has two more inputs: de(in 0) = 0, de(out 1) = 2, and both have di = 1
    mask = torch.tensor([[True, False, False, False], [True, True, True, True]])
    assert ch3_l3p(mask)[0, 1].item() == pytest.approx(1 / math.sqrt(3), rel=1e-12)
    assert ch2_l3p(mask)[0, 1].item() == pytest.approx(2 / math.sqrt(3), rel=1e-12)
    # U: 2 common over 4 − 1 = 3 = x + 1, so 2 / 3^(1 + 2/3); V: in 0 and in 1 share out 1, 2 / max(2 − 1, 1)
    assert ch3_1_l3n(mask)[0, 1].item() == pytest.approx(2 / 3 ** (5 / 3) + 2, rel=1e-6)
    assert ch2_l3n(mask)[0, 1].item() == pytest.approx(2 / 3 + 2, rel=1e-6)


def test_too_large_a_layer_is_refused_with_its_cost(monkeypatch):
    # 4096² · half of 4096² links = 1.4e14
    mask = (torch.arange(4096) % 2 == 0).expand(4096, 4096)
    with pytest.raises(
        ValueError, match=r"4096 x 4096 with 8388608 links take 1\.4e\+14 .* use the node-based ch2_l3n"
    ):
        ch2_l3p(mask)
    with pytest.raises(ValueError, match="use the node-based ch3_l3n"):
        ch3_l3p(torch.zeros(1, 2**14 + 1, dtype=torch.bool))
    monkeypatch.setattr(path_based, "_LARGEST_COST", 16 * 4 * 4)
    full = torch.ones(4, 4, dtype=torch.bool)
    assert ch3_l3p(full).eq(0).all()
    monkeypatch.setattr(path_based, "_LARGEST_COST", 16 * 4 * 4 - 1)
    with pytest.raises(ValueError, match="multiply-adds"):
        ch3_l3p(full)


@pytest.mark.parametrize("function", [ch2_l3p, ch3_l3p, ch3_1_l3n])
def test_a_float_mask_is_refused(function):
    with pytest.raises(ValueError, match=r"bool tensor .* got torch.float32 \(3, 4\)"):
        function(torch.ones(3, 4))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 1000], 1.0),
        ([1, 2, 3, 4], [9, 8, 7, -1], -1.0),
        # without equals 1 − 6·Σd²/(n(n² − 1)): d = (0, 1, −1, 1, −1), Σd² = 4
        ([1, 2, 3, 4, 5], [1, 3, 2, 5, 4], 1 - 6 * 4 / (5 * 24)),
        # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: Σxy = 4.5, Σx² = 4.5, Σy² = 5
        ([0.0, 7.0, 7.0, 9.0], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),
        # ranks 2, 2, 2, 4 and 1.5, 3.5, 1.5, 3.5: x = −.5, −.5, −.5, 1.5; y = ∓1: Σxy = 2, Σx² = 3, Σy² = 4
        ([0, 0, 0, 5], [1, 2, 1, 2], 2 / math.sqrt(12)),
    ],
)
def test_spearman_by_hand(first, second, expected):
    first, second = torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)
    assert spearman(first, second) == pytest.approx(expected, abs=1e-12)
    order = torch.tensor([2, 0, *range(3, len(first)), 1])
    assert spearman(second[order], first[order]) == pytest.approx(expected, abs=1e-12)


def test_spearman_without_an_order_or_with_bad_input():
    assert math.isnan(spearman(torch.ones(3), torch.arange(3.0)))
    with pytest.raises(ValueError, match=r"got \(3,\) and \(4,\)"):
        spearman(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="NaN has no rank"):
        spearman(torch.tensor([0.0, math.nan]), torch.ones(2))

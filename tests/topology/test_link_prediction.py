"""L3n scores against golden figures of an independent implementation, and against loops over paths."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hf_chts.topology import link_prediction
from hf_chts.topology.link_prediction import ch2_l3n, ch3_l3n
from hf_chts.topology.scores import relative_importance

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "reference_scores.npz")
CASES = sorted({key.split("/")[0] for key in GOLDEN if not key.startswith("schedule")})
METHODS = {"CH2-L3n": (ch2_l3n, lambda common: common + 1), "CH3-L3n": (ch3_l3n, lambda common: 1)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_golden_figures(case, name):
    scores = METHODS[name][0](torch.tensor(GOLDEN[f"{case}/mask"]))
    np.testing.assert_allclose(scores.numpy(), GOLDEN[f"{case}/{name}"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_golden_relative_importance(case):
    weight, mask = torch.tensor(GOLDEN[f"{case}/weight"]), torch.tensor(GOLDEN[f"{case}/mask"])
    np.testing.assert_allclose(relative_importance(weight, mask).numpy(), GOLDEN[f"{case}/ri"], rtol=1e-5, atol=0)


def by_paths(mask, numerator):
    """Paths i - b - a - j: each bridging output a adds the strength of (i, a), each bridging input b that of (j, b)."""
    outs, ins = mask.shape
    inputs = [set(np.flatnonzero(mask[i])) for i in range(outs)]
    outputs = [set(np.flatnonzero(mask[:, j])) for j in range(ins)]

    def strength(mine, theirs):
        common = len(mine & theirs)
        return numerator(common) / max(len(theirs) - common, 1)

    scores = np.zeros(mask.shape)
    for i in range(outs):
        for j in range(ins):
            if j in inputs[i]:
                continue
            # each output a that bridges, once: it shares an input with i and is linked to j; likewise each input b
            for a in outputs[j]:
                if inputs[i] & inputs[a]:
                    scores[i, j] += strength(inputs[i], inputs[a])
            for b in inputs[i]:
                if outputs[b] & outputs[j]:
                    scores[i, j] += strength(outputs[j], outputs[b])
    return scores


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(7, 11), (12, 5), (9, 9)])
@pytest.mark.parametrize("density", [0.1, 0.4, 0.8])
def test_random_networks_with_empty_rows_and_columns(name, shape, density):
    rng = np.random.default_rng(shape[0])
    mask = rng.random(shape) < density
    mask[2], mask[:, 3] = False, False
    function, numerator = METHODS[name]
    scores = function(torch.tensor(mask))
    np.testing.assert_allclose(scores.numpy(), by_paths(mask, numerator), rtol=1e-5, atol=0)
    assert scores[torch.tensor(mask)].eq(0).all()
    assert scores[2].eq(0).all()
    assert scores[:, 3].eq(0).all()


@pytest.mark.parametrize("integer", [False, True], ids=["fp32 products", "8-bit products"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (9, 1), (200, 1), (1, 9), (1, 200), (9, 7)])
def test_sides_of_one_node_by_either_product(shape, integer, monkeypatch):
    monkeypatch.setattr(link_prediction, "_integer_products_are_faster", lambda: integer)
    mask = np.random.default_rng(shape[0]).random(shape) < 0.5
    expected = by_paths(mask, lambda common: common + 1)
    for _ in range(3):  # what lies behind a matrix in memory changes
        np.testing.assert_allclose(ch2_l3n(torch.tensor(mask)), expected, rtol=1e-5)


def test_more_nodes_than_a_block_of_rows():
    rng = np.random.default_rng(0)
    mask = rng.random((700, 6)) < 0.3
    np.testing.assert_allclose(ch2_l3n(torch.tensor(mask)), by_paths(mask, lambda common: common + 1), rtol=1e-5)
    np.testing.assert_allclose(ch2_l3n(torch.tensor(mask.T)), by_paths(mask.T, lambda common: common + 1), rtol=1e-5)


def test_a_float_mask_is_refused():
    with pytest.raises(ValueError, match=r"bool tensor .* got torch.float32 \(3, 4\)"):
        ch2_l3n(torch.ones(3, 4))

"""Scores of links against figures worked out by hand."""

import pytest
import torch

from hf_chts.topology.evolution import Choice, remove
from hf_chts.topology.random_streams import random_seed
from hf_chts.topology.scores import magnitude_by_sign, random


def removed(weight, fraction):
    """The weights of the links that go."""
    mask = torch.ones_like(weight, dtype=torch.bool)
    halves = remove(
        weight[None], mask[None], links=[mask.numel()], drop_fraction=fraction, removal=Choice(one_by_one),
        pruning=Choice(random), seeds=lambda purpose: [random_seed(0, 1, 0, purpose)],
    )  # fmt: skip
    return sorted(weight[~halves.kept[0]].tolist())


def one_by_one(weights, masks):
    return torch.stack([magnitude_by_sign(weight, mask) for weight, mask in zip(weights, masks, strict=True)])


def test_smallest_positive_and_largest_negative_weights_go_apart():
    # ten of either sign; by magnitude alone all that go would be negative
    weight = torch.tensor([[*range(101, 111)], [*range(-10, 0)]], dtype=torch.float32)
    assert removed(weight, 0.3) == [-3, -2, -1, 101, 102, 103]
    # 0.4 of ten, and of five
    weight = torch.tensor([[*range(1, 11), -50, -40, -30, -20, -10]], dtype=torch.float32)
    assert removed(weight, 0.4) == [-20, -10, 1, 2, 3, 4]


def test_ranks_are_shared_by_equal_weights_and_missing_links_have_none():
    weight = torch.tensor([[2.0, 2.0, 5.0, -1.0, 0.0, 9.0]])
    mask = torch.tensor([[True, True, True, True, True, False]])
    # 2, 2 and 5 are the positive ones: half of the links below, half of those up to each, over three
    expected = [(0 + 2) / 6, (0 + 2) / 6, (2 + 3) / 6, (0 + 1) / 2, 0, 0]
    assert magnitude_by_sign(weight, mask)[0].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_never_left_0_go_first(dtype):
    weight = torch.tensor([[0.0, 3.0, -2.0, 0.0, 1.0, -4.0]], dtype=dtype)
    assert removed(weight, 1 / 3) == [0.0, 0.0]


def test_a_weight_that_is_no_number_is_not_ranked_away():
    with pytest.raises(ValueError, match="finite"):
        removed(torch.tensor([[1.0, float("nan"), -2.0]]), 0.4)

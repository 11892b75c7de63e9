"""Exactly k, among the candidates, with the probabilities of sampling without replacement."""

import itertools

import pytest
import torch

from hf_chts.topology.random_streams import random_stream
from hf_chts.topology.sampling import choose


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("k", [0, 1, 3, 17, 59, 60])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 9.0])
def test_exactly_k_candidates(soft, k, temperature):
    generator = random_stream("test")
    scores = torch.rand(10, 12, generator=generator)
    candidates = torch.zeros(10, 12, dtype=torch.bool)
    candidates.view(-1)[torch.randperm(120, generator=generator)[:60]] = True
    chosen = choose(scores, k, candidates, soft=soft, temperature=temperature, generator=generator)
    assert chosen.shape == scores.shape
    assert int(chosen.sum()) == k
    assert not (chosen & ~candidates).any()


def test_hard_takes_the_highest():
    scores = torch.tensor([[0.5, 0.9, 0.1], [0.7, 0.3, 1.0]])
    candidates = torch.tensor([[True, True, True], [True, True, False]])
    chosen = choose(scores, 3, candidates, soft=False, generator=random_stream(0))
    assert chosen.tolist() == [[True, True, False], [True, False, False]]


def test_scores_of_zero_come_last_and_uniformly():
    scores = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0, 0.0])
    candidates = torch.ones(6, dtype=torch.bool)
    for soft in (False, True):
        counts = torch.zeros(6)
        for draw in range(4000):
            counts += choose(scores, 3, candidates, soft=soft, generator=random_stream(draw, soft))
        assert counts[[1, 3]].eq(4000).all()
        assert chi_square(counts[[0, 2, 4, 5]], torch.full((4,), 1000.0)) < 21.1  # p = 1e-4 with 3 degrees


def test_ties_are_broken_uniformly():
    scores = torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 0.5])
    candidates = torch.ones(6, dtype=torch.bool)
    counts = torch.zeros(6)
    for draw in range(4000):
        counts += choose(scores, 2, candidates, soft=False, generator=random_stream(draw))
    assert counts[0] == 4000
    assert counts[5] == 0
    assert chi_square(counts[1:5], torch.full((4,), 1000.0)) < 21.1


def inclusion(weights, k):
    """Exact inclusion probabilities of successive sampling, over all ordered draws."""
    probability = torch.zeros(len(weights), dtype=torch.float64)
    for order in itertools.permutations(range(len(weights)), k):
        p, left = 1.0, sum(weights)
        for index in order:
            p *= weights[index] / left
            left -= weights[index]
        probability[list(order)] += p
    return probability


def chi_square(observed, expected):
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("k", [2, 4])
def test_soft_inclusion_frequencies(temperature, k):
    scores = torch.tensor([1.0, 2.0, 3.0, 0.5, 1.5, 2.5])
    expected = inclusion([float(s) ** temperature for s in scores], k)
    counts = torch.zeros(6, dtype=torch.float64)
    draws = 20_000
    candidates = torch.ones(6, dtype=torch.bool)
    generator = random_stream("soft", k)
    for _ in range(draws):
        counts += choose(scores, k, candidates, soft=True, temperature=temperature, generator=generator)
    # Bernoulli variances; the counts are negatively correlated, so the bound is generous (6 degrees, p = 1e-4)
    statistic = ((counts - draws * expected) ** 2 / (draws * expected * (1 - expected))).sum()
    assert statistic < 27.9


def test_soft_inclusion_by_draws_with_repeats():
    """k much smaller than n takes the other sampler: 16 equal groups, exact probabilities from the groups' symmetry."""
    scores = torch.tensor([1.0, 3.0]).repeat(16)
    expected = inclusion_of_two(scores)
    counts = torch.zeros(32, dtype=torch.float64)
    draws = 20_000
    generator = random_stream("draws")
    candidates = torch.ones(32, dtype=torch.bool)
    for _ in range(draws):
        counts += choose(scores, 2, candidates, soft=True, generator=generator)
    statistic = ((counts - draws * expected) ** 2 / (draws * expected * (1 - expected))).sum()
    assert statistic < 72.0  # 32 degrees, p = 1e-4


def inclusion_of_two(scores):
    weights = scores.to(torch.float64)
    total = weights.sum()
    first = weights / total
    second = torch.stack(
        [
            sum(first[i] * weights[j] / (total - weights[i]) for i in range(len(weights)) if i != j)
            for j in range(len(weights))
        ]
    )
    return first + second


def test_same_generator_state_same_choice():
    scores = torch.rand(1000, generator=random_stream(0))
    candidates = scores > 0.1
    first = choose(scores, 50, candidates, soft=True, generator=random_stream(5))
    assert torch.equal(first, choose(scores, 50, candidates, soft=True, generator=random_stream(5)))
    assert not torch.equal(first, choose(scores, 50, candidates, soft=True, generator=random_stream(6)))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    choose(
        torch.rand(99, generator=random_stream(0)),
        9,
        torch.ones(99, dtype=torch.bool),
        soft=True,
        generator=random_stream(1),
    )
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.slow
@pytest.mark.parametrize("k", [100_000, 30_000_000])
def test_fifty_million_candidates(k):
    candidates = torch.ones(50_000_000, dtype=torch.bool)
    scores = torch.rand(50_000_000, generator=random_stream("large"))
    chosen = choose(scores, k, candidates, soft=True, generator=random_stream("large", k))
    assert int(chosen.sum()) == k
    # the later half is chosen as often as the first: nothing stops at 2^24
    assert abs(int(chosen[25_000_000:].sum()) / k - 0.5) < 0.01
    # a score in proportion: the mean score of few chosen is E[s²]/E[s] = 2/3
    if k == 100_000:
        assert abs(float(scores[chosen].mean()) - 2 / 3) < 0.01


@pytest.mark.parametrize(
    ("scores", "k", "temperature", "message"),
    [
        (torch.ones(4), 5, 1.0, "cannot choose 5 of 4"),
        (torch.ones(4), -1, 1.0, "cannot choose -1 of 4"),
        (torch.tensor([1.0, -2.0, 1.0, 1.0]), 2, 1.0, "minimum of -2.0"),
        (torch.tensor([1.0, float("nan"), 1.0, 1.0]), 2, 1.0, "nan"),
        (torch.tensor([1.0, float("inf"), 1.0, 1.0]), 2, 1.0, "inf"),
        (torch.ones(4), 2, -1.0, "temperature is -1.0"),
        (torch.ones(5), 2, 1.0, "must have one shape"),
    ],
)
def test_bad_input(scores, k, temperature, message):
    with pytest.raises(ValueError, match=message):
        choose(
            scores, k, torch.ones(4, dtype=torch.bool), soft=True, temperature=temperature, generator=random_stream(0)
        )

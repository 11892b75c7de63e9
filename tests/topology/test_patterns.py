"""Patterns: numbers of links by run, soft draws within runs, and choices that do not depend on the stack."""

import pytest
import torch
from cases import check_pattern

from hf_chts import SparsityConfig
from hf_chts.topology import patterned_evolution
from hf_chts.topology.evolution import Choice
from hf_chts.topology.parts import INITIAL_TOPOLOGIES
from hf_chts.topology.patterns import Pattern, choose_in_runs, pattern_of, shares_of_runs, under_pattern
from hf_chts.topology.random_streams import random_stream

CPU = torch.device("cpu")


def seeds(purpose):
    return [len(purpose), -len(purpose)]


def test_names():
    assert pattern_of("none") is None
    assert pattern_of("fan_in") == Pattern()
    two_of_four = pattern_of("2:4")
    assert (two_of_four, two_of_four.name, two_of_four.sparsity) == (Pattern(2, 4), "2:4", 0.5)
    for bad in ("4:4", "5:4", "0:4", "2-4", "fan-in", "02:4"):
        with pytest.raises(ValueError, match=f"pattern is '{bad}'; choose none, fan_in, or N:M"):
            pattern_of(bad)


def test_numbers_by_hand():
    assert Pattern().numbers([11, 8], 4, 10, CPU).tolist() == [[3, 3, 3, 2], [2, 2, 2, 2]]
    assert Pattern(2, 4).numbers([12], 3, 8, CPU).tolist() == [[2] * 6]
    with pytest.raises(ValueError, match="3 x 8 has 12 links under pattern '2:4', not 13"):
        Pattern(2, 4).numbers([13], 3, 8, CPU)
    with pytest.raises(ValueError, match="10 inputs are no whole number of groups of 4"):
        Pattern(2, 4).width(10)


def test_no_row_gains_when_the_layer_loses():
    for links in range(1, 40):
        more, fewer = Pattern().numbers([links, links - 1], 7, 6, CPU)
        assert (more >= fewer).all()
        assert int(more.sum()) == links


def test_hard_choices_by_hand():
    scores = torch.tensor([[[5.0, 1, 4, 3, 2, 9, 0, 7]]])
    candidates = torch.tensor([[[True, True, False, True, True, True, True, True]]])
    numbers = torch.tensor([[2, 3]])
    chosen = choose_in_runs(scores, numbers, candidates, [3], soft=False)
    assert chosen[0, 0].tolist() == [True, False, False, True, True, True, False, True]
    with pytest.raises(ValueError, match="cannot choose 4 of 3 candidates"):
        choose_in_runs(scores, torch.tensor([[4, 1]]), candidates, [3], soft=False)
    with pytest.raises(ValueError, match="finite and >= 0; got a minimum of -9"):
        choose_in_runs(-scores, numbers, candidates, [3], soft=False)


@pytest.mark.parametrize("soft", [False, True])
def test_scores_of_0_come_last_and_then_uniformly(soft):
    scores = torch.zeros(1, 20000, 4)
    scores[..., 1] = 1
    candidates = torch.tensor([True, True, False, True]).expand_as(scores)
    chosen = choose_in_runs(scores, torch.full((1, 20000), 2), candidates, [5], soft=soft)[0]
    assert chosen[:, 1].all()
    assert chosen.sum(0).tolist()[2] == 0
    assert int(chosen[:, 0].sum()) == pytest.approx(10000, abs=300)


def test_soft_choices_draw_in_proportion():
    scores = torch.tensor([1.0, 2, 3, 4]).expand(1, 50000, 4)
    every = torch.ones_like(scores, dtype=torch.bool)
    for temperature in (1.0, 2.0):
        chosen = choose_in_runs(scores, torch.ones(1, 50000, dtype=torch.int64), every, [1], soft=True,
                                temperature=temperature)  # fmt: skip
        weights = torch.tensor([1.0, 2, 3, 4]) ** temperature
        torch.testing.assert_close(chosen[0].double().mean(0).float(), weights / weights.sum(), atol=0.01, rtol=0)


@pytest.mark.parametrize("soft", [False, True])
def test_a_layer_of_a_stack_chooses_as_alone(soft, monkeypatch):
    scores = (torch.rand(3, 6, 12, generator=random_stream(1)) * 3).round()
    candidates = torch.rand(3, 6, 12, generator=random_stream(2)) < 0.8
    numbers = candidates.view(3, 18, 4).sum(2) // 2
    temperatures = [0.5, 1.0, 7.0]
    together = choose_in_runs(scores, numbers, candidates, [4, 5, -6], soft=soft, temperature=temperatures)
    assert together.view(3, 18, 4).sum(2).equal(numbers)
    monkeypatch.setattr("hf_chts.topology.patterns._ELEMENTS", 9)
    for n, seed in enumerate([4, 5, -6]):
        one = slice(n, n + 1)
        alone = choose_in_runs(
            scores[one], numbers[one], candidates[one], [seed], soft=soft, temperature=temperatures[n]
        )
        assert alone[0].equal(together[n])


def test_shares_are_exact_and_within_one():
    numbers = torch.randint(0, 30, (2, 50), generator=random_stream(3))
    totals = numbers.sum(1)
    for share in (0.0, 0.013, 0.1, 0.7, 1.0):
        wanted = [round(share * int(total)) for total in totals]
        found = shares_of_runs(numbers, wanted, [7, -8])
        assert found.sum(1).tolist() == wanted
        exact = numbers * torch.tensor(wanted)[:, None] / totals[:, None]
        assert ((found - exact).abs() < 1).all()
        assert ((found >= 0) & (found <= numbers)).all()


@pytest.mark.parametrize(
    "name", sorted(name for name, part in INITIAL_TOPOLOGIES.items() if not part.needs & {"inputs", "choose"})
)
@pytest.mark.parametrize("pattern", ["fan_in", "2:4"])
def test_initial_topologies(name, pattern):
    config = SparsityConfig("static", sparsity=0.5, initial_topology=name)
    drawn = INITIAL_TOPOLOGIES[name](
        config, out_features=20, in_features=24, links=240, generator=random_stream(0, name)
    )
    found = under_pattern(drawn, pattern_of(pattern), 240, 1)
    check_pattern(pattern, found)
    assert int(found.sum()) == 240
    width = 4 if pattern == "2:4" else 24
    runs, kept, asked = drawn.view(-1, width), found.view(-1, width), 2 if pattern == "2:4" else 12
    for before, after in zip(runs, kept, strict=True):  # as many of its links as the run has places for
        assert int((before & after).sum()) == min(int(before.sum()), asked)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("pattern", "links"), [("fan_in", 100), ("2:4", 192)])
def test_an_update_keeps_the_pattern(pattern, links, soft):
    shape = (2, 16, 24)
    pattern = pattern_of(pattern)
    weights = torch.randn(shape, generator=random_stream(1))
    drawn = torch.rand(shape, generator=random_stream(2)) < 0.5
    masks = torch.stack([under_pattern(mask, pattern, links, n) for n, mask in enumerate(drawn)])
    weights = weights.where(masks, 0)
    choice = Choice(lambda weights, masks: weights.abs(), soft=soft, temperature=[1.0, 3.0])
    halves = patterned_evolution.remove(
        weights, masks, links=[links, links], drop_fraction=0.3, removal=choice, pruning=choice, seeds=seeds,
        pattern=pattern,
    )  # fmt: skip
    removed = round(0.3 * links)
    assert halves.left == [links - removed] * 2 == halves.kept.sum((1, 2)).tolist()
    assert not (halves.kept & ~masks).any()
    scores = torch.rand(shape, generator=random_stream(3))
    new, returned = patterned_evolution.regrow(
        halves, links=[links, links], regrowth=Choice(lambda masks: scores, soft=soft), seeds=seeds, pattern=pattern
    )
    assert (new & halves.kept).equal(halves.kept)
    for layer in range(2):
        assert int(new[layer].sum()) == links
        check_pattern(pattern.name, new[layer])
        assert int((new & masks & ~halves.kept)[layer].sum()) == int(returned[layer])
    if pattern.name == "fan_in":
        lost = (masks & ~halves.kept).sum(2)
        assert ((lost - 0.3 * masks.sum(2)).abs() < 1).all()
        assert new.sum(2).equal(masks.sum(2))
        if not soft:  # the smallest of each row leave, the highest scores of each row come
            for row in range(16):
                kept = weights[0, row].abs()[halves.kept[0, row]]
                assert kept.min() >= weights[0, row].abs()[masks[0, row] & ~halves.kept[0, row]].max()


def test_pruning_moves_rows_by_whole_links():
    pattern = Pattern()
    masks = under_pattern(torch.ones(10, 20, dtype=torch.bool), pattern, 100, 0)[None]
    weights = torch.rand(1, 10, 20, generator=random_stream(4)).where(masks, 0)
    choice = Choice(lambda weights, masks: weights.abs())
    halves = patterned_evolution.remove(
        weights, masks, links=[63], drop_fraction=0.0, removal=choice, pruning=choice, seeds=seeds, pattern=pattern
    )
    assert halves.stay.sum(2).tolist() == [[7] * 3 + [6] * 7]
    assert (halves.before, halves.stayed, halves.left) == ([100], [63], [63])


def test_config():
    assert SparsityConfig("chts", pattern="2:4").sparsity == 0.5
    assert SparsityConfig("set", pattern="1:4").initial_sparsity == 0.75
    assert SparsityConfig("chtss", pattern="fan_in").sparsity == 0.9
    assert "pattern" not in SparsityConfig("chts").to_dict()
    config = SparsityConfig("chts", pattern="2:4")
    assert SparsityConfig.from_dict(config.to_dict()) == config
    for fields, message in [
        ({"method": "chts", "pattern": "2:4", "sparsity": 0.9}, "sparsity is 0.9, but under pattern '2:4' it is 0.5"),
        ({"method": "chtss", "pattern": "2:4"}, "'sigmoid' .method 'chtss'.* set sparsity_schedule: constant"),
        ({"method": "chts", "pattern": "2:4", "allocation": "erdos_renyi"}, "set allocation: uniform"),
        ({"method": "chts", "pattern": "2:4", "layer_sparsity": {"q_proj": 0.5}}, "leave layer_sparsity out"),
        ({"method": "chts", "pattern": "fan_in", "percolation": True}, "set percolation to false"),
        ({"pattern": 124}, 'in quotes in YAML: "2:4"'),
        ({"pattern": "fan"}, "choose none, fan_in, or N:M"),
    ]:
        with pytest.raises(ValueError, match=message):
            SparsityConfig(**fields)


def test_yaml_keeps_the_name(tmp_path):
    config = SparsityConfig("chts", pattern="2:4")
    config.save(tmp_path / "config.yaml")
    assert SparsityConfig.load(tmp_path / "config.yaml") == config

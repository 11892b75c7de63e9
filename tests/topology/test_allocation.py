"""Links shared out among layers: exact totals, the rules worked out by hand and by sorting."""

import pytest
import torch

from hf_chts.topology.allocation import allocate_links, apportion
from hf_chts.topology.random_streams import random_stream

SHAPES = {"q": (16, 16), "k": (4, 16), "up": (43, 16), "down": (16, 43), "one": (1, 1)}
LLAMA = {f"{i}.{n}": s for i in range(8) for n, s in {"q": (512, 512), "up": (1376, 512), "down": (512, 1376)}.items()}


def scores_of(shapes, key=0):
    generator = random_stream(key)
    return {name: torch.randn(shape, generator=generator).abs() for name, shape in shapes.items()}


@pytest.mark.parametrize("shapes", [SHAPES, LLAMA])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.777, 0.9, 0.98])
@pytest.mark.parametrize("how", ["uniform", "erdos_renyi", "global"])
def test_exact_total_within_each_layer(shapes, sparsity, how):
    scores = scores_of(shapes) if how == "global" else None
    links = allocate_links(shapes, sparsity, how, scores)
    sizes = {name: o * i for name, (o, i) in shapes.items()}
    assert list(links) == list(shapes)
    assert sum(links.values()) == round(sum(sizes.values()) * (1 - sparsity))
    assert all(1 <= n <= sizes[name] for name, n in links.items())


def test_uniform_is_the_same_density_to_within_a_link():
    # a quarter of 6, 10 and 9 is 1.5, 2.5 and 2.25; of the 6 links in all (6.25), the odd one goes to the first .5
    links = allocate_links({"a": (2, 3), "b": (2, 5), "c": (3, 3)}, 0.75)
    assert links == {"a": 2, "b": 2, "c": 2}


def test_erdos_renyi_by_hand():
    # nodes 8, 20, 40; 0.15 of 16 + 64 + 400 = 72 links, 72/68 for each node: 8.47, 21.18, 42.35
    shapes = {"a": (4, 4), "b": (4, 16), "c": (20, 20)}
    assert allocate_links(shapes, 0.85, "erdos_renyi") == {"a": 9, "b": 21, "c": 42}
    # at 240 links a (28.2 of 16) and b (70.6 of 64) are full, and c has the other 160
    assert allocate_links(shapes, 0.5, "erdos_renyi") == {"a": 16, "b": 64, "c": 160}
    # at 100 a is full (11.76 for each would be 100/68·8; 16 are there), so at 140 (16.5): a full, 124 in shares 1:2
    assert allocate_links(shapes, 1 - 140 / 480, "erdos_renyi") == {"a": 16, "b": 41, "c": 83}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sparsity", [0.2, 0.7, 0.95])
def test_global_counts_the_highest_of_all(sparsity, dtype):
    shapes = {name: shape for name, shape in SHAPES.items() if name != "one"}
    scores = scores_of(shapes)
    scores["up"] *= 3  # so that layers differ; at 95%, "k" has none among the highest
    scores = {name: score.to(dtype) for name, score in scores.items()}
    links = allocate_links(shapes, sparsity, "global", scores)
    # by sorting: the best of each layer, then the highest of all others
    rest = {name: score.float().flatten().sort(descending=True).values[1:] for name, score in scores.items()}
    wanted = sum(links.values()) - len(scores)
    threshold = torch.cat(list(rest.values())).sort(descending=True).values[wanted - 1]
    for name, score in rest.items():
        above, level = int((score > threshold).sum()), int((score >= threshold).sum())
        assert 1 + above <= links[name] <= 1 + level
        if dtype != torch.bfloat16:  # which has equals
            assert links[name] == 1 + level


def test_global_leaves_a_layer_its_best_link():
    scores = {"weak": torch.tensor([[1e-6, 2e-6]]), "strong": torch.arange(1.0, 9.0).view(2, 4)}
    assert allocate_links({"weak": (1, 2), "strong": (2, 4)}, 0.5, "global", scores) == {"weak": 1, "strong": 4}
    assert allocate_links({"weak": (1, 2), "strong": (2, 4)}, 0.8, "global", scores) == {"weak": 1, "strong": 1}


def test_global_leaves_each_layer_its_fewest_and_shares_the_rest_by_scores():
    torch.manual_seed(0)
    scores = {"weak": 0.01 * torch.rand(6, 5), "middle": 0.5 + torch.rand(6, 5), "strong": 1 + torch.rand(6, 5)}
    shapes = dict.fromkeys(scores, (6, 5))
    assert allocate_links(shapes, 0.5, "global", scores)["weak"] == 1
    links = allocate_links(shapes, 0.5, "global", scores, {"weak": 6, "middle": 2})
    others = torch.cat([scores["middle"].flatten(), scores["strong"].flatten()]).sort(descending=True).values[:39]
    assert links == {
        "weak": 6,
        "middle": int((scores["middle"] >= others[-1]).sum()),
        "strong": int((scores["strong"] >= others[-1]).sum()),
    }
    assert sum(links.values()) == 45
    # a layer that the others' fewest push below its own has its own, too
    links = allocate_links(shapes, 0.8, "global", scores, {"weak": 6, "middle": 6, "strong": 6})
    assert links == {"weak": 6, "middle": 6, "strong": 6}
    with pytest.raises(ValueError, match="leaves 18 of 90 links, and the 3 layers must have at least 19"):
        allocate_links(shapes, 0.8, "global", scores, {"weak": 7, "middle": 6, "strong": 6})


def test_global_shares_equals_in_proportion():
    scores = {"a": torch.zeros(4, 5), "b": torch.zeros(2, 5)}
    scores["a"][0, 0] = 1.0
    # 15 of 30: the best of each, then 13 zeros among 19 and 9
    assert allocate_links({"a": (4, 5), "b": (2, 5)}, 0.5, "global", scores) == {"a": 1 + 9, "b": 1 + 4}


def test_apportion_by_hand():
    assert apportion(torch.tensor([1, 1, 1]), 8, 10).tolist() == [3, 3, 2]
    assert apportion(torch.tensor([1.0, 1.0, 8.0]), 10, 5).tolist() == [3, 2, 5]  # 8 is cut to 5, 5 are shared 1:1
    assert apportion(torch.tensor([1, 100]), 10, 20, least=2).tolist() == [2, 8]
    assert apportion(torch.tensor([3, 4, 5]), 12, torch.tensor([3, 4, 5])).tolist() == [3, 4, 5]
    assert apportion(torch.tensor([3, 4, 5]), 0, 9).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, 0.5), "no layer to share"),
        (({"a": (4, 0)}, 0.5), "a: a layer has at least one node a side; got 4 x 0"),
        (({"a": (4, 4)}, 1.0), r"sparsity is 1.0; it must lie in \[0, 1\)"),
        (({"a": (2, 2), "b": (2, 2)}, 0.9), "leaves 1 of 8 links for 2 layers"),
        (({"a": (4, 4)}, 0.5, "erk"), "how is 'erk'; choose one of 'uniform', 'erdos_renyi', 'global'"),
        (({"a": (4, 4)}, 0.5, "global"), "give those of each layer"),
        (({"a": (4, 4)}, 0.5, "uniform", {"a": torch.ones(4, 4)}), "takes no scores"),
        (({"a": (4, 4)}, 0.5, "global", {"b": torch.ones(4, 4)}), r"missing \['a'\], unknown \['b'\]"),
        (
            ({"a": (4, 4)}, 0.5, "global", {"a": torch.ones(4, 5)}),
            r"torch.float32 \(4, 5\); the layer takes .*\(4, 4\)",
        ),
        (({"a": (4, 4)}, 0.5, "global", {"a": torch.ones(4, 4, dtype=torch.int64)}), "torch.int64"),
        (({"a": (4, 4)}, 0.5, "global", {"a": -torch.ones(4, 4)}), r"finite and >= 0; got a minimum of -1.0"),
        (({"a": (4, 4)}, 0.5, "global", {"a": torch.full((4, 4), float("nan"))}), "finite and >= 0"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate_links(*arguments)

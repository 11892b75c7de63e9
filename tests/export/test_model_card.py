"""Model cards: what the Hub reads of them, and what they say to people."""

import json

import pytest
from huggingface_hub import EvalResult, ModelCard
from tiny import tiny_llama
from transformers import LlamaForSequenceClassification, T5Config, T5ForConditionalGeneration
from transformers.trainer_utils import SchedulerType

from hf_chts import SparsityConfig, sparsify
from hf_chts.export.model_card import last_evaluation, model_card, progress
from hf_chts.export.model_facts import LayerFacts, ModelFacts
from hf_chts.export.pushed_card import with_figures, with_repository, with_results
from hf_chts.export.zero_shot_results import published, results_section
from hf_chts.markdown import with_section


def card_of(model=None, config=None, **given):
    sparse = sparsify(model or tiny_llama(), config or SparsityConfig())
    return ModelCard(model_card(ModelFacts.of_model(sparse), **({"training": {}, "metrics": {}} | given)))


@pytest.mark.parametrize(
    ("dataset", "ids", "place"),
    [
        ("allenai/c4", ["allenai/c4"], ("allenai/c4", "allenai/c4")),
        ("openwebtext", ["openwebtext"], ("openwebtext", "openwebtext")),
        ("embedded", None, ("embedded", "Python standard library sources (embedded corpus of hf_chts)")),
        ("/data/me/corpus.jsonl", None, ("local", "corpus.jsonl")),
        ("./corpus", None, ("local", "corpus")),
        (None, None, ("local", "validation data")),
    ],
)
def test_data_sets(dataset, ids, place):
    training = {} if dataset is None else {"dataset": dataset}
    card = card_of(training=training, metrics={"loss": 1.25, "tokens": 7, "perplexity": float("nan"), "note": "x"})
    assert card.data.datasets == ids
    found = [(r.dataset_type, r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert found == [(*place, "loss", 1.25), (*place, "tokens", 7)]
    assert {r.task_type for r in card.data.eval_results} == {"text-generation"}


def test_a_local_folder_is_not_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "data/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert card_of(training={"dataset": "data/mine"}).data.datasets is None


def test_metadata():
    card = card_of(metrics={"loss": 1.0})
    assert card.data.get("base_model") is None  # from random weights
    assert card.data.to_dict()["model-index"][0]["name"] == "LlamaForCausalLM-chtss"
    given = {"license": "mit", "language": "en", "base_model": "a/b", "tags": ["x", "sparse"], "model_name": "n"}
    card = card_of(metadata={**given, "datasets": "c/d"}, training={"dataset": "allenai/c4"}, metrics={"loss": 1.0})
    assert (card.data.license, card.data.language, card.data.base_model) == ("mit", "en", "a/b")
    assert card.data.datasets == ["allenai/c4", "c/d"]
    assert sorted(card.data.tags) == ["chtss", "dynamic-sparse-training", "hf_chts", "sparse", "x"]
    assert card.data.model_name == "n"
    with pytest.raises(ValueError, match="metadata of the model card"):
        card_of(metadata={"eval_results": "none"})


def test_other_tasks_than_text_generation():
    classes = LlamaForSequenceClassification(tiny_llama().config)
    assert card_of(classes).data.pipeline_tag == "text-classification"
    small = T5Config(d_model=16, d_ff=32, d_kv=4, num_layers=1, num_heads=4, vocab_size=50)
    card = card_of(T5ForConditionalGeneration(small), SparsityConfig(method="set"))
    assert card.data.get("pipeline_tag") is None
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card.text


def test_text():
    training = {"dataset": "/home/me/secret/corpus", "schedule": SchedulerType.COSINE, "a|b": "c|d", "rate": 0.00123456}
    card = card_of(training=training)
    assert "| dataset | corpus |" in card.text
    assert "/home/me" not in str(card)
    assert "| schedule | cosine |" in card.text
    assert "| a\\|b | c\\|d |" in card.text
    assert "| rate | 0.001235 |" in card.text
    assert "| hidden_size | 40 |" in card.text
    assert (
        "sparsity from 50% to 90% (sigmoid), removal by `magnitude` (soft), regrowth by `ch2_l3n` (soft)" in card.text
    )
    static = card_of(config=SparsityConfig(method="static")).text
    assert "initial topology `erdos_renyi`, never changed." in static
    assert "removal" not in card_of(config=SparsityConfig(method="gmp")).text


def test_facts_by_hand():
    layers = [LayerFacts("up", (4, 10), 4), LayerFacts("up", (4, 10), 6), LayerFacts("down", (10, 4), 10)]
    facts = ModelFacts("LlamaForCausalLM", SparsityConfig(method="set"), layers, {})
    assert facts.links == 20
    assert facts.missing == 1 - 20 / 120
    text = model_card(facts, training={}, metrics={})
    assert "| `up` | 2 | 4 × 10 | 10 | 87.50% |" in text
    assert "| all sparse layers | 3 | | 20 | 83.33% |" in text


def test_results_replace_earlier_ones():
    def result(value):
        return {"tasks": {"piqa": {"acc": value, "acc_stderr": None, "alias": "piqa"}}}

    text = str(card_of(metrics={"loss": 1.0}))
    once = with_results(text, result(0.5))
    twice = with_figures(with_results(with_figures(once, ["a.png"]), result(0.75)), ["b_c.png"])
    card = ModelCard(twice)
    assert [(r.dataset_type, r.metric_value) for r in card.data.eval_results] == [("local", 1.0), ("piqa", 0.75)]
    assert "| piqa | acc | 0.7500 |  |" in card.text
    assert "0.5000" not in card.text
    assert "![b c](figures/b_c.png)" in card.text
    assert "a.png" not in card.text
    assert card.text.count("\n## ") == text.count("\n## ") + 2
    assert card.data.eval_results[1] == EvalResult("text-generation", "piqa", "piqa", "acc", 0.75)
    assert "not finite" in with_results(text, result(None))


def test_results_of_trivial_answers():
    tasks = {"rte": {"acc": 0.5, "mcc": 0.0, "label": "x"}, "boolq": {"acc": 0.75}, "wiki": {"bits": 1.5}}
    result = {"tasks": tasks, "trivial": {"rte": {"acc": 0.53, "mcc": 0.0}}, "chance": {"rte": 0.1, "boolq": 0.5}}
    lines = results_section(result).splitlines()
    assert lines[2:6] == [
        "| rte | acc | 0.5000 | 0.5300 |", "| rte | mcc | 0.0000 | 0.0000 |", "| boolq | acc | 0.7500 | 0.5000 |",
        "| wiki | bits | 1.5000 |  |",
    ]  # fmt: skip
    infinite = {"model": "a/b", "tasks": {"wiki": {"bits": float("inf")}}}
    assert json.loads(published(infinite)) == [{"model": "a/b", "tasks": {"wiki": {"bits": None}}}]


def test_sections():
    assert with_section("# a\n\n## B\n\nold\n\n## C\n\nc\n", "B", "new") == "# a\n\n## B\n\nnew\n\n## C\n\nc\n"
    assert with_section("# a\n\n## B\n\nold\n", "B", "new") == "# a\n\n## B\n\nnew\n"
    assert with_section("# a", "B", "new") == "# a\n\n## B\n\nnew\n"
    assert with_repository("f(DIRECTORY_OR_HUB_ID)", "a/b", "main") == 'f("a/b")'


def test_what_a_trainer_logged():
    history = [
        {"eval_loss": 3.0},
        {"loss": 2.0},
        {"eval_loss": 1.5, "eval_runtime": 3.2, "eval_x": None},
        {"loss": 1.0},
    ]
    assert last_evaluation(history) == {"loss": 1.5}
    assert last_evaluation([{"loss": 2.0}]) == {}
    assert [progress(*given) for given in ((5, 10), (10, 10), (0, 10), (None, None), (5, None))] == [
        "5 of 10", "10", None, None, "5",
    ]  # fmt: skip

import math

import evaluate
import pytest

import hf_chts.evaluation.language_modeling as language_modeling
from hf_chts.evaluation import LanguageModeling, language_modeling_scores

# log2 of the probabilities 1/2, 1/8, 1/4 is 1 + 3 + 2 = 6 bits, for 4 bytes; the last token is an EOS of none
NLL = [math.log(2), math.log(8), math.log(4)]
LENGTHS = [1, 3, 0]


def check(scores):
    assert scores["bits_per_byte"] == pytest.approx(6 / 4, rel=1e-12)
    assert scores["loss"] == pytest.approx(2 * math.log(2), rel=1e-12)
    assert scores["perplexity"] == pytest.approx(4, rel=1e-12)
    assert set(scores) == {"loss", "perplexity", "bits_per_byte"}


def test_hand_computed():
    check(language_modeling_scores(NLL, LENGTHS))


def test_metric_class_also_loaded_by_path(tmp_path, monkeypatch):
    check(LanguageModeling(cache_dir=str(tmp_path)).compute(predictions=NLL, references=LENGTHS))
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = language_modeling.__file__
    metric = evaluate.load(path, cache_dir=str(tmp_path))
    metric.add_batch(predictions=NLL[:1], references=LENGTHS[:1])
    metric.add_batch(predictions=NLL[1:], references=LENGTHS[1:])
    check(metric.compute())


def test_diverged_model_has_infinite_perplexity():
    assert language_modeling_scores([1e4], [1])["perplexity"] == math.inf
    assert math.isnan(language_modeling_scores([math.nan], [1])["perplexity"])


@pytest.mark.parametrize(
    ("nll", "lengths", "named"), [([1.0, 2.0], [1], "shapes"), ([], [], "0 tokens"), ([1.0], [0], "0 bytes")]
)
def test_nothing_to_score(nll, lengths, named):
    with pytest.raises(ValueError, match=named):
        language_modeling_scores(nll, lengths)

"""All tasks of the suites on local data files that were made up, without a network."""

import csv
import gzip
import json
import re
import warnings
from collections import Counter

import datasets
import numpy as np
import pytest
from made_data import CLASSES, labels, rows, write_rows, write_task
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, matthews_corrcoef

from hf_chts.evaluation import SUITES, evaluate_zero_shot, task_run
from hf_chts.evaluation.suites import suite_tasks

LABELLED = set(SUITES["glue"] + SUITES["superglue"]) - {"copa", "record"}
ALL = "glue,superglue,commonsense,perplexity"
COUNT = 10


@pytest.fixture(scope="module")
def everything(tmp_path_factory, tiny_llama, byte_tokenizer):
    """The result of all tasks in one run, and the records of the harness: {task: samples}."""
    directory = tmp_path_factory.mktemp("data")
    for task in suite_tasks(ALL):
        write_task(directory, task, COUNT)
    recorded = {}

    def recording(**settings):
        raw = evaluate(**settings)
        recorded.update(raw["samples"])
        return raw

    with pytest.MonkeyPatch.context() as patch:
        evaluate = task_run.evaluate
        patch.setattr(task_run, "evaluate", recording)
        patch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
        model = tiny_llama(10, max_position_embeddings=1024)
        result = evaluate_zero_shot(model, ALL, tokenizer=byte_tokenizer, task_data=directory, bootstrap_iters=20)
    return result, recorded, directory


def gold_and_predicted(samples):
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    predicted = [int(np.argmax([float(answer[0]) for answer in sample["filtered_resps"]])) for sample in samples]
    return [int(sample["target"]) for sample in samples], predicted


def test_every_task_runs_on_local_files(everything):
    result, _, directory = everything
    tasks = suite_tasks(ALL)
    assert result["skipped"] == {}
    assert result["samples"] == dict.fromkeys(tasks, COUNT)
    assert result["data"] == {task: str(directory / task) for task in tasks}
    assert all(result["tasks"][task] for task in tasks)


@pytest.mark.parametrize("task", sorted(LABELLED))
def test_classifier_scores_are_scikit_learn_s_on_the_harness_s_samples(everything, task):
    result, recorded, _ = everything
    gold, predicted = gold_and_predicted(recorded[task])
    # the harness read the labels that the file has, in its order
    assert gold == labels(COUNT, CLASSES.get(task, 2))
    scores, trivial = result["tasks"][task], result["trivial"][task]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes that are named in the answers only
        assert scores["acc"] == pytest.approx(accuracy_score(gold, predicted))
        assert scores["mcc"] == pytest.approx(matthews_corrcoef(gold, predicted))
        assert scores["balanced_acc"] == pytest.approx(balanced_accuracy_score(gold, predicted))
        if task in ("mrpc", "qqp"):
            assert trivial["f1"] == pytest.approx(max(f1_score(gold, [c] * COUNT) for c in (0, 1)))
    assert trivial["acc"] == max(np.bincount(gold)) / COUNT == 0.6
    assert trivial["mcc"] == 0
    assert trivial["balanced_acc"] == pytest.approx(1 / len(set(gold)))
    for metric in ("acc", "mcc", "balanced_acc"):
        assert scores[f"{metric}_stderr"] >= 0
    pairs = Counter(zip(gold, predicted, strict=True))
    classes = range(len(result["labels"][task]["names"]))
    assert result["labels"][task]["confusion"] == [[pairs[true, answer] for answer in classes] for true in classes]


def test_which_tasks_have_labels_and_averages(everything):
    result, _, _ = everything
    # the model's seed was chosen so that not all answers are alike
    found = [np.count_nonzero(np.sum(entry["confusion"], axis=0)) for entry in result["labels"].values()]
    assert sum(count > 1 for count in found) >= 8
    assert set(result["labels"]) == LABELLED
    assert result["labels"]["multirc"]["names"] == ["yes", "no"]
    assert result["labels"]["mnli"]["names"] == ["True", "Neither", "False"]
    assert result["trivial"]["hellaswag"] == {"acc": 0.25, "acc_norm": 0.25}
    assert set(result["tasks"]["copa"]) == {"acc", "acc_stderr"}
    glue = result["averages"]["glue"]
    assert sorted(glue["mcc"]["tasks"]) == sorted(SUITES["glue"])
    assert glue["acc"]["trivial"] == pytest.approx(0.6)
    assert sorted(result["averages"]["superglue"]["acc"]["tasks"]) == sorted(set(SUITES["superglue"]) - {"record"})


def test_record_is_scored_by_words_and_exactly(everything):
    result, recorded, _ = everything
    exact, overlap = [], []
    for sample in recorded["record"]:
        answer = sample["doc"]["entities"][int(np.argmax([float(ll) for ll, _ in sample["filtered_resps"]]))]
        (gold,) = sample["doc"]["answers"]
        exact.append(answer == gold)
        # "Ada 3" and "Cleo 3": one word of two
        overlap.append(len(set(answer.split()) & set(gold.split())) / 2)
    assert result["tasks"]["record"]["em"] == pytest.approx(np.mean(exact))
    assert result["tasks"]["record"]["f1"] == pytest.approx(np.mean(overlap))


@pytest.fixture
def score(tiny_llama, byte_tokenizer):
    def run(directory, suite, **options):
        model = tiny_llama(10, max_position_embeddings=1024)
        return evaluate_zero_shot(model, suite, tokenizer=byte_tokenizer, task_data=directory, **options)

    return run


def test_kinds_of_files_give_the_same(tmp_path, score):
    made = rows("wnli")
    write_rows(tmp_path / "lines/wnli/validation.jsonl", made)
    names = ["not_entailment", "entailment"]
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("sentence1", "sentence2")}
        | {"label": datasets.ClassLabel(names=names), "idx": datasets.Value("int32")}
    )
    # in two parts, as in a clone of the Hub's repository
    clone = tmp_path / "parquet/glue/wnli"
    clone.mkdir(parents=True)
    for part, chosen in enumerate((made[:6], made[6:])):
        path = clone / f"validation-0000{part}-of-00002.parquet"
        datasets.Dataset.from_list(chosen, features=features).to_parquet(path)
    for kind, opened in (("csv", open), ("csv.gz", gzip.open)):
        path = tmp_path / kind / "wnli" / f"validation.{kind}"
        path.parent.mkdir(parents=True)
        with opened(path, "wt", newline="") as file:
            writer = csv.DictWriter(file, made[0].keys())
            writer.writeheader()
            writer.writerows(made)
    (tmp_path / "json/wnli").mkdir(parents=True)
    named = [item | {"label": names[item["label"]]} for item in made]
    (tmp_path / "json/wnli/validation.json").write_text(json.dumps(named))
    found = {kind: score(tmp_path / kind, "wnli") for kind in ("lines", "parquet", "csv", "csv.gz", "json")}
    for kind, result in found.items():
        assert result["tasks"] == found["lines"]["tasks"], kind
        assert result["labels"] == found["lines"]["labels"], kind


def test_examples_come_from_the_training_file(tmp_path, score, monkeypatch):
    write_task(tmp_path, "rte")
    prompts = []

    def recording(**settings):
        raw = evaluate(**settings)
        prompts.extend(sample["arguments"][0][0] for sample in raw["samples"]["rte"])
        return raw

    evaluate = task_run.evaluate
    monkeypatch.setattr(task_run, "evaluate", recording)
    with pytest.raises(ConnectionError, match=r"rte has no train\.jsonl"):
        score(tmp_path, "rte", num_fewshot=1)
    example = {"sentence1": "An example.", "sentence2": "It is one.", "label": 1}
    write_rows(tmp_path / "rte/train.jsonl", [example] * 3)
    assert score(tmp_path, "rte", num_fewshot=1, limit=2)["config"]["num_fewshot"] == {"rte": 1}
    start = "An example.\nQuestion: It is one. True or False?\nAnswer: False\n\n"
    assert len(prompts) == 2
    assert all(prompt.startswith(start) for prompt in prompts)


def changed(task, number, **columns):
    made = rows(task)
    for name, value in columns.items():
        if value is None:
            del made[number - 1][name]
        else:
            made[number - 1][name] = value
    return made


@pytest.mark.parametrize(
    ("task", "made", "named"),
    [
        ("rte", changed("rte", 7, sentence2=None), r"validation.jsonl, row 7: column sentence2 is missing; needed are "
         r"sentence1, sentence2, label, found sentence1, label, idx"),
        ("rte", changed("rte", 3, label="perhaps"), r"row 3: column label is 'perhaps': use 0 \(entailment\), 1 "),
        ("rte", changed("rte", 3, label=2), r"row 3: column label is 2: use 0"),
        ("rte", changed("rte", 3, label=0.5), r"row 3: column label is 0.5: use 0"),
        ("rte", changed("rte", 1, label=-1), r"row 1: column label is -1, as in a test split"),
        ("sst2", changed("sst2", 2, sentence=["a"]), r"row 2: column sentence is \['a'\], where .* has a string"),
        ("record", changed("record", 2, entities="Ada"), r"row 2: column entities is 'Ada', where .* a list"),
        ("wsc", changed("wsc", 4, span2_index="He"), r"row 4: column span2_index is 'He', where .* an integer"),
        ("copa", changed("copa", 9, question="why"), r"no prompt can be made of document 9: KeyError: 'why'"),
        ("openbookqa", changed("openbookqa", 5, answerKey="Z"), r"no prompt can be made of document 5"),
        ("rte", [], "has no rows"),
        ("rte", [3], "row 1 is 3: a row is an object"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_and_the_other_tasks_run(tmp_path, score, task, made, named):
    write_rows(write_task(tmp_path, task), made)
    write_task(tmp_path, "wnli", 4)
    result = score(tmp_path, f"{task},wnli")
    assert list(result["tasks"]) == ["wnli"]
    assert re.search(named, result["skipped"][task]), result["skipped"]


def test_bad_files_are_named(tmp_path, score):
    (tmp_path / "rte").mkdir()
    with pytest.raises(ConnectionError, match=r"rte has no validation.jsonl \(nor .*\); there is nothing"):
        score(tmp_path, "rte")
    (tmp_path / "rte/validation.jsonl").write_text('{"sentence1": "a",\n')
    with pytest.raises(ConnectionError, match=r"validation.jsonl cannot be read"):
        score(tmp_path, "rte")
    (tmp_path / "rte/validation.csv").touch()
    with pytest.raises(ConnectionError, match=r"validation.jsonl and validation.csv: leave one"):
        score(tmp_path, "rte")
    with pytest.raises(FileNotFoundError, match=r"task_data='.*none' is not a directory"):
        score(tmp_path / "none", "rte")


def test_a_task_without_a_folder_says_where_its_file_would_go(tmp_path, score, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no network in this test")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConnectionError, match=r"nyu-mll/glue mnli, is not cached.*DIR/mnli/validation_matched\.jsonl"):
        score(tmp_path, "mnli")

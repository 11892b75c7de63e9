import json
import math
import random
import socket
from pathlib import Path

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager

from hf_chts import SparseTrainer, SparseTrainingArguments, SparsityConfig, export_sparse
from hf_chts.data.embedded import embedded_documents, train_byte_level_bpe
from hf_chts.evaluation import SUITES, check_model, evaluate_zero_shot, task_run
from hf_chts.evaluation.embedded_suite import passages, questions
from hf_chts.evaluation.harness_tasks import load_tasks, task_manager
from hf_chts.evaluation.suites import check_task_names, suite_tasks


def ids_of(text):
    """Each byte is a token, numbered by GPT-2's character for it: printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: byte for byte in printable} | {byte: 256 + n for n, byte in enumerate(others)}
    order = sorted(characters.values())
    return [1 + order.index(characters[byte]) for byte in text.encode()]


def log_probability(model, context, continuation):
    with torch.no_grad():
        logits = model(torch.tensor([(context + continuation)[:-1]])).logits[0].double().log_softmax(-1)
    rows = range(len(context) - 1, len(context) + len(continuation) - 1)
    return sum(float(logits[row, token]) for row, token in zip(rows, continuation, strict=True))


@pytest.mark.parametrize("length", [640, 200])
def test_bits_per_byte_agrees_with_windows_worked_out_by_hand(tiny_llama, byte_tokenizer, length):
    model = tiny_llama(0).eval()
    result = evaluate_zero_shot(
        model,
        "embedded_bits_per_byte",
        tokenizer=byte_tokenizer,
        limit=6,
        batch_size=3,
        max_length=None if length == 640 else length,
    )
    passage_nats, passage_bytes, windows = [], [], 0
    for row in passages(embedded_documents("test"))[:6]:
        tokens = [0, *ids_of(row["text"])]  # the first token is predicted from EOS
        count = len(tokens) - 1
        nats = 0.0
        for start in range(0, count, length):
            end = min(start + length, count)
            begin = max(0, end - length)  # the last window is filled up with what came before
            nats -= log_probability(model, tokens[begin : start + 1], tokens[start + 1 : end + 1])
            windows += 1
        passage_nats.append(nats)
        passage_bytes.append(len(row["text"].encode()))
    nats, total_bytes = sum(passage_nats), sum(passage_bytes)
    assert windows > 6
    assert result["config"]["prefix_token_id"] == 0
    assert result["config"]["max_length"] == length
    scores = result["tasks"]["embedded_bits_per_byte"]
    # the harness has no error of it; here by the delta method, from each passage's nats and bytes
    bits, sizes = np.array(passage_nats) / math.log(2), np.array(passage_bytes)
    residuals = bits - sizes * bits.sum() / sizes.sum()
    error = math.sqrt(6 / 5 * (residuals**2).sum()) / sizes.sum()
    assert scores["bits_per_byte_stderr"] == pytest.approx(error, rel=0.1)  # they part by 1/n, and n is 6
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / total_bytes, rel=1e-5)
    assert scores["byte_perplexity"] == pytest.approx(math.exp(nats / total_bytes), rel=1e-5)


def test_next_line_agrees_with_choices_scored_by_hand(tiny_llama, byte_tokenizer):
    model = tiny_llama(1).eval()
    result = evaluate_zero_shot(model, "embedded_next_line", tokenizer=byte_tokenizer, limit=16)
    right = right_by_length = 0
    for question in questions(embedded_documents("test"))[:16]:
        # the harness counts the white space at the context's end to the continuation
        context = question["context"].rstrip()
        gap = question["context"][len(context) :] + "\n"
        scores = [log_probability(model, ids_of(context), ids_of(gap + choice)) for choice in question["choices"]]
        per_character = [score / len(choice) for score, choice in zip(scores, question["choices"], strict=True)]
        right += scores.index(max(scores)) == question["answer"]
        right_by_length += per_character.index(max(per_character)) == question["answer"]
    scores = result["tasks"]["embedded_next_line"]
    accuracy = right / 16
    assert scores["acc"] == pytest.approx(accuracy)
    assert scores["acc_norm"] == pytest.approx(right_by_length / 16)
    assert scores["acc_stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 15))
    assert result["chance"] == {"embedded_next_line": 0.25}
    assert result["trivial"]["embedded_next_line"] == {"acc": 0.25, "acc_norm": 0.25}
    assert result["samples"] == {"embedded_next_line": 16}


def test_saved_model_scores_as_the_live_one_without_a_network(tiny_llama, byte_tokenizer, saved_models, monkeypatch):
    def refuse(*arguments, **options):
        attempts.append(arguments)
        raise OSError("no network in this test")

    attempts = []
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    # a relative path of two parts looks like a Hub id
    monkeypatch.chdir(saved_models[0].parent.parent)
    directory = f"{saved_models[0].parent.name}/{saved_models[0].name}"
    saved = evaluate_zero_shot(directory, "embedded", limit=4)
    assert attempts == []
    live = evaluate_zero_shot(tiny_llama(0), "embedded", tokenizer=byte_tokenizer, limit=4)
    assert saved["tasks"] == live["tasks"]
    assert set(saved["tasks"]) == set(SUITES["embedded"])
    assert saved["model"] == directory
    assert json.loads(json.dumps(saved, allow_nan=False)) == saved
    other = evaluate_zero_shot(saved_models[1], "embedded_bits_per_byte", limit=4)
    assert other["tasks"]["embedded_bits_per_byte"] != live["tasks"]["embedded_bits_per_byte"]


def test_a_training_run_is_not_disturbed(tiny_llama, byte_tokenizer):
    model = tiny_llama(0).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    # not the state that an evaluation before this one may have left
    random.seed(7), torch.manual_seed(7), np.random.seed(7)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    evaluate_zero_shot(model, "embedded_next_line", tokenizer=byte_tokenizer, limit=1)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert after == before
    assert [module.training for module in model.modules()] == modes
    assert byte_tokenizer.pad_token is None


def test_a_model_in_training_is_evaluated_without_dropout_and_begins_texts_with_eos(tiny_llama):
    tokenizer = train_byte_level_bpe(["text"], 257)
    assert tokenizer.bos_token is None
    model = tiny_llama(0)
    evaluated = evaluate_zero_shot(model.eval(), "embedded_bits_per_byte", tokenizer=tokenizer, limit=1)
    assert evaluated["config"]["prefix_token_id"] == tokenizer.eos_token_id == 0
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    in_training = evaluate_zero_shot(model.train(), "embedded_bits_per_byte", tokenizer=tokenizer, limit=1)
    assert in_training["tasks"] == evaluated["tasks"]


def test_contexts_that_do_not_fit_are_reported(tiny_llama, byte_tokenizer, caplog):
    model = tiny_llama(0)
    result = evaluate_zero_shot(model, "embedded_next_line", tokenizer=byte_tokenizer, limit=3, max_length=150)
    assert result["truncated_requests"] == 12
    assert [record.message for record in caplog.records if "max_length=150" in record.message] != []
    assert not any("exceeds model's maximum length" in record.message for record in caplog.records)


def test_number_of_examples_and_missing_data(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1 =", "answer": "2"}\n' * 3)
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "c")},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "tag": "sums",
    }
    absent = {"data_files": {"test": str(tmp_path / "absent.jsonl")}, "cache_dir": str(tmp_path / "c")}
    variants = {"own": {"num_fewshot": 2}, "none": {}, "zero": {"num_fewshot": 0}, "gone": {"dataset_kwargs": absent}}
    for name, change in variants.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | task | change))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def examples(num_fewshot):
        loaded = load_tasks(manager, ["sums"], num_fewshot)
        assert list(loaded.skipped) == ["gone"]
        assert "absent.jsonl" in loaded.skipped["gone"]
        return {name: unit["tasks"][name].config.num_fewshot for name, unit in loaded.units.items()}

    assert examples(None) == {"own": 2, "none": 0, "zero": 0}
    assert examples(1) == {"own": 1, "none": 1, "zero": 0}
    assert examples(0) == {"own": 0, "none": 0, "zero": 0}


def test_a_task_that_fails_does_not_cost_the_others(tiny_llama, byte_tokenizer, monkeypatch, caplog):
    def evaluate(**settings):
        if "embedded_bits_per_byte" in settings["task_dict"]["tasks"]:
            raise RuntimeError("out of memory")
        return run(**settings)

    run = task_run.evaluate
    monkeypatch.setattr(task_run, "evaluate", evaluate)
    result = evaluate_zero_shot(tiny_llama(0), "embedded", tokenizer=byte_tokenizer, limit=2)
    assert list(result["tasks"]) == ["embedded_next_line"]
    assert result["skipped"] == {"embedded_bits_per_byte": "it failed: RuntimeError: out of memory"}
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_zero_shot(tiny_llama(0), "embedded_bits_per_byte", tokenizer=byte_tokenizer, limit=2)


def test_batch_size_auto(tiny_llama, byte_tokenizer, capsys):
    found = [
        evaluate_zero_shot(tiny_llama(0, 64), "embedded", tokenizer=byte_tokenizer, limit=3, batch_size=size)["tasks"]
        for size in (1, "auto")
    ]
    for task, scores in found[0].items():
        assert found[1][task] == pytest.approx(scores, rel=1e-5)
    assert capsys.readouterr().out == ""  # what the harness says of it is not for those who read our output


@pytest.mark.parametrize(("packed", "storage"), [(False, "masked"), (True, "masked"), (False, "links")])
def test_exports_score_as_the_live_sparse_model_to_the_last_digit(
    tmp_path, tiny_llama, byte_tokenizer, packed, storage
):
    model = tiny_llama(0)
    args = SparseTrainingArguments(str(tmp_path / "run"), max_steps=4, report_to=[], use_cpu=True, disable_tqdm=True)
    blocks = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(32)]
    sparsity = SparsityConfig(method="chts", sparsity=0.7, update_interval=2, storage=storage)
    SparseTrainer(model=model, args=args, sparsity=sparsity, train_dataset=blocks).train()
    export_sparse(model, tmp_path / "export", tokenizer=byte_tokenizer, packed=packed)
    live = evaluate_zero_shot(model, "embedded", tokenizer=byte_tokenizer, limit=9)
    exported = evaluate_zero_shot(tmp_path / "export", "embedded", limit=9)
    for part in ("tasks", "documents", "trivial", "samples"):
        assert exported[part] == live[part]
    assert exported["tasks"]["embedded_bits_per_byte"]["bits_per_byte"] > 0


def test_the_network_is_tried_once(tmp_path, monkeypatch):
    tried = []

    def unreachable(*arguments, **options):
        tried.append((datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE))
        raise ConnectionError("no network in this test")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    names = ["rte", "piqa", "boolq"]
    loaded = load_tasks(task_manager(names, tmp_path), names)
    assert tried == [(False, False), (True, True), (True, True)]
    assert datasets.config.HF_HUB_OFFLINE is huggingface_hub.constants.HF_HUB_OFFLINE is False
    assert loaded.units == {}
    assert loaded.skipped["piqa"].startswith("its data, baber/piqa, is not cached and could not be downloaded. ")
    assert "DIR/piqa/validation.jsonl" in loaded.skipped["piqa"]


def test_suites_and_lists_of_tasks():
    assert suite_tasks("embedded") == ["embedded_bits_per_byte", "embedded_next_line"]
    assert suite_tasks("superglue, commonsense").count("boolq") == 1
    assert suite_tasks("perplexity,mmlu") == ["wikitext", "mmlu"]
    with pytest.raises(ValueError, match=r"'hellaswaq'.*embedded, glue.*Closest: hellaswag"):
        check_task_names(["rte", "hellaswaq"], ["rte", "hellaswag"])


def test_the_harness_has_every_task_of_the_suites_without_a_scan_of_all_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_chts.evaluation.harness_tasks._all_harness_tasks", lambda: pytest.fail("scanned them all"))
    names = suite_tasks(",".join(name for name in SUITES if name != "embedded"))
    index = task_manager(names, tmp_path).task_index
    check_task_names(names, index)
    assert set(suite_tasks("glue")) == index["glue"].tags
    assert set(suite_tasks("superglue")) == index["super-glue-lm-eval-v1"].tags


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"limit": 0}, ValueError, "limit=0"),
        ({"num_fewshot": -1}, ValueError, "num_fewshot=-1"),
        ({"batch_size": "many"}, ValueError, "batch_size='many'"),
        ({"tokenizer": None}, ValueError, "pass tokenizer"),
        ({"dtype": "bfloat16"}, ValueError, "dtype='bfloat16'"),
        ({"max_length": 641}, ValueError, "max_length=641.*640"),
        ({"suite": "embedded,"}, ValueError, "empty name"),
        ({"device": "gpu"}, ValueError, "device='gpu' does not exist"),
        ({"device": "cuda:99"}, ValueError, "device='cuda:99': this machine shows"),
    ],
)
def test_options_out_of_range(tiny_llama, byte_tokenizer, options, error, named):
    with pytest.raises(error, match=named):
        evaluate_zero_shot(tiny_llama(0), **({"tokenizer": byte_tokenizer} | options))


def test_tokenizer_of_another_model(tiny_llama, byte_tokenizer):
    model = tiny_llama(0)
    model.resize_token_embeddings(100)
    with pytest.raises(ValueError, match=r"257 tokens.*100 embeddings"):
        evaluate_zero_shot(model, tokenizer=byte_tokenizer)


def test_a_missing_model_is_an_error_before_anything_is_loaded(tmp_path, tiny_llama, monkeypatch):
    def too_far(*arguments, **options):
        raise AssertionError("the suite was written before the model was looked for")

    monkeypatch.setattr("hf_chts.evaluation.zero_shot.write_embedded_suite", too_far)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").touch()
    for missing in (tmp_path / "none", "runs/none", "./none", "a/b/c", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match=r"no directory .*(none|c)"):
            evaluate_zero_shot(missing)
    with pytest.raises(FileNotFoundError, match=r"runs has no config\.json"):
        evaluate_zero_shot("runs")
    with pytest.raises(FileNotFoundError, match="file is a file"):
        evaluate_zero_shot("file")
    tiny_llama(0).save_pretrained("runs")
    with pytest.raises(FileNotFoundError, match="runs has a model but no tokenizer"):
        evaluate_zero_shot("runs")
    with pytest.raises(ValueError, match=r"max_length=641.*640.*of runs"):
        check_model("runs", tokenizer=False, max_length=641)
    Path("runs/config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="runs is a t5, which is not a causal language model"):
        check_model("runs", tokenizer=False)

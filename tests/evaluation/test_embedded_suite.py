import json
import math
from collections import Counter

import pytest
from lm_eval.tasks import TaskManager

from hf_chts.data.embedded import Document, embedded_documents
from hf_chts.evaluation import embedded_suite, write_embedded_suite
from hf_chts.evaluation.embedded_suite import passages, questions


@pytest.fixture(scope="module")
def documents():
    return embedded_documents("test")


@pytest.fixture(scope="module")
def asked(documents):
    return questions(documents)


def test_choices_are_lines_of_a_held_out_file_that_only_the_context_tells_apart(documents, asked):
    texts = {document.path: document.text for document in documents}
    for question in asked:
        true = question["choices"][question["answer"]]
        lines = texts[question["path"]].split("\n")
        assert f"\n{question['context']}\n{true}\n" in f"\n{texts[question['path']]}\n"
        assert lines[question["line"]] == true
        assert 200 <= len(question["context"]) <= 400
        choices = question["choices"]
        assert len({choice.strip() for choice in choices}) == len(choices) == 4
        shown = {line.strip() for line in question["context"].split("\n")}
        for choice in choices:
            assert lines.count(choice) == 1
            assert choice.strip() not in shown
            assert 12 <= len(choice.strip()) <= len(choice) <= 100


def test_enough_questions_from_many_files_with_balanced_answers(asked):
    assert math.sqrt(0.25 / len(asked)) <= 0.025
    assert max(Counter(question["path"] for question in asked).values()) < len(asked) / 5
    for first in (len(asked), 40):
        positions = Counter(question["answer"] for question in asked[:first])
        assert [positions[i] for i in range(4)] == [first // 4] * 4
    assert len({(question["path"], question["line"]) for question in asked}) == len(asked)


@pytest.mark.parametrize("key", [len, lambda line: -len(line), lambda line: len(line) - len(line.lstrip()), str.strip])
def test_rules_that_ignore_the_context_score_as_chance_does(asked, key):
    """The shortest, the longest, the least indented line, the first in the alphabet."""
    score = 0.0
    for question in asked:
        values = [key(choice) for choice in question["choices"]]
        if values[question["answer"]] == min(values):
            score += 1 / values.count(min(values))
    # three standard errors
    assert abs(score / len(asked) - 0.25) < 3 * math.sqrt(0.25 * 0.75 / len(asked))


def test_questions_depend_on_the_documents_alone(documents, asked):
    # a new file changes no other file's questions
    assert questions([Document("new.py", "x = 1\n"), *documents]) == asked


def test_passages_are_whole_lines_of_held_out_files(documents):
    texts = {document.path: document.text for document in documents}
    rows = passages(documents)
    assert len(rows) == 128
    assert {row["path"] for row in rows} == set(texts)
    for row in rows:
        assert row["text"] in texts[row["path"]]
        assert 0 < len(row["text"]) <= 2000
        assert row["text"].endswith("\n") or texts[row["path"]].endswith(row["text"])
    for path, text in texts.items():
        cut = passages([Document(path, text)])
        assert len({row["text"] for row in cut}) > 0
        if len(text) < 20_000:  # all of it is there, once
            assert sum(len(row["text"]) for row in cut) == len(text)


def test_the_harness_asks_exactly_the_lines_written(tmp_path, asked):
    names = write_embedded_suite(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert set(manager.all_tasks) == set(names)
    task = manager.load(["embedded_next_line"])["tasks"]["embedded_next_line"]
    task.build_all_requests(limit=12, rank=0, world_size=1)
    arguments = [instance.args for instance in task.instances]
    expected = [(question["context"], "\n" + choice) for question in asked[:12] for choice in question["choices"]]
    assert arguments == expected


def test_written_files_are_the_same_every_time_and_versioned_by_their_content(tmp_path, monkeypatch):
    documents = [Document("m.py", "".join(f"value_{i} = {i} * {i}\n" for i in range(200)))]
    monkeypatch.setattr(embedded_suite, "_rows", embedded_suite._rows.__wrapped__)  # made anew each time
    for name in ("a", "b", "c"):
        if name == "c":
            monkeypatch.setattr("hf_chts.evaluation.embedded_suite.embedded_documents", lambda split: documents)
        write_embedded_suite(tmp_path / name)
    versions = {}
    for task in ("embedded_bits_per_byte", "embedded_next_line"):
        data = [(tmp_path / name / f"{task}.jsonl").read_bytes() for name in ("a", "b", "c")]
        assert data[0] == data[1] != data[2]
        assert all(json.loads(line) for line in data[0].splitlines())
        for name in ("a", "b", "c"):
            text = (tmp_path / name / f"{task}.yaml").read_text()
            versions[name] = next(line for line in text.splitlines() if "version:" in line)
        assert versions["a"] == versions["b"] != versions["c"]

"""Two lm-eval tasks from the embedded corpus's held-out test split: a zero-shot evaluation without a network.

`embedded_bits_per_byte` scores passages of source files. `embedded_next_line` asks which of four lines of a file comes
next. All choices are made by a hash of the file's path and the line number, so the tasks depend only on the corpus, and
so on the Python version; the version of a task, `recipe+digest of the data`, tells them apart.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hf_chts.data.embedded import Document, embedded_documents

EMBEDDED_TASKS = ("embedded_bits_per_byte", "embedded_next_line")

_RECIPE = 1  # raise when the same corpus would give other tasks
_PASSAGES, _PASSAGE_CHARACTERS = 128, 2000
# the standard error of an accuracy is at most 0.5 / sqrt(900) = 1.7%
_QUESTIONS, _CHOICES = 900, 4
# some 120 tokens, so that question and choice fit into a context of 256 tokens, as small models have
_CONTEXT_CHARACTERS, _LEAST_CONTEXT_CHARACTERS = 400, 200
_LEAST_LINE_CHARACTERS, _LINE_CHARACTERS = 12, 100

_T = TypeVar("_T")


def write_embedded_suite(directory: Path) -> tuple[str, ...]:
    """Write both tasks into `directory`, made if missing, for `TaskManager(include_path=directory)`.

    Returns the names of the tasks. Raises FileNotFoundError where `hf_chts.data.embedded_documents` does.
    """
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    rolling: dict[str, Any] = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        ],
    }
    # The summed log-likelihood (acc) prefers short lines, its mean over characters (acc_norm) long ones, so both are
    # reported. The four lines come from one pool, so that either preference alone scores 25%.
    next_line: dict[str, Any] = {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "\n",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    }
    for name, task, rows in zip(EMBEDDED_TASKS, (rolling, next_line), _rows(), strict=True):
        _write_task(directory, name, task, rows)
    return EMBEDDED_TASKS


@lru_cache(maxsize=1)
def _rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of both tasks; they take a second to make and are the same for every model."""
    documents = embedded_documents("test")
    return passages(documents), questions(documents)


def passages(documents: Iterable[Document]) -> list[dict[str, Any]]:
    """Up to 128 passages of at most 2,000 characters (or one longer line), whole lines, spread over the documents.

    Each is `{"path", "text"}`. The first passage of a document begins where the document does; the others begin in the
    middle of it, as a block of a packed training set does.
    """
    pools = []
    for document in documents:
        pool: list[dict[str, Any]] = []
        text = ""
        for line in document.text.splitlines(keepends=True):
            if text and len(text) + len(line) > _PASSAGE_CHARACTERS:
                pool.append({"path": document.path, "text": text})
                text = ""
            text += line
        pool.append({"path": document.path, "text": text})
        pools.append(_by_hash((f"passage {document.path} {i}", row) for i, row in enumerate(pool)))
    return in_turns(pools)[:_PASSAGES]


def questions(documents: Iterable[Document]) -> list[dict[str, Any]]:
    """Up to 900 questions, spread over the documents: which of four lines of a file comes next?

    Each is `{"path", "line", "context", "choices", "answer"}`: `line` is the true line's index in the file (from 0),
    `context` the whole lines before it, at most 400 characters, without the last line end, `choices` four different
    lines and `answer` the true one's index. All four have from 12 (stripped) to 100 characters and occur once in the
    file, and not in the context. The wrong ones are drawn from the lines that could be asked for themselves, so that
    only the context tells them apart. Every index is the answer equally often, also among the first n questions.
    """
    pools = []
    for document in documents:
        lines = document.text.split("\n")
        stripped = Counter(line.strip() for line in lines)
        contexts = {
            i: context
            for i, line in enumerate(lines)
            if _LEAST_LINE_CHARACTERS <= len(line.strip()) <= len(line) <= _LINE_CHARACTERS
            and stripped[line.strip()] == 1
            and len((context := _context(lines, i)).strip()) >= _LEAST_CONTEXT_CHARACTERS
        }
        pool = []
        for i, context in contexts.items():
            shown = range(i - context.count("\n") - 1, i + 1)
            others = [j for j in contexts if j not in shown]
            if len(others) >= _CHOICES - 1:
                pool.append((f"question {document.path} {i}", (document.path, lines, i, context, others)))
        pools.append(_by_hash(pool))
    rows = []
    for n, (path, lines, i, context, others) in enumerate(in_turns(pools)[:_QUESTIONS]):
        wrong = _by_hash((f"wrong {path} {i} {j}", lines[j]) for j in others)[: _CHOICES - 1]
        answer = n % _CHOICES
        choices = [*wrong[:answer], lines[i], *wrong[answer:]]
        rows.append({"path": path, "line": i, "context": context, "choices": choices, "answer": answer})
    return rows


def _context(lines: list[str], index: int) -> str:
    start = index
    length = -1  # without the last line end
    while start > 0 and length + len(lines[start - 1]) + 1 <= _CONTEXT_CHARACTERS:
        start -= 1
        length += len(lines[start]) + 1
    return "\n".join(lines[start:index])


def _by_hash(keyed: Iterable[tuple[str, _T]]) -> list[_T]:
    ranked = sorted(keyed, key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    return [value for _, value in ranked]


def in_turns(pools: Sequence[Sequence[_T]]) -> list[_T]:
    """The first of every pool, then the second of every pool that has one, and so on."""
    longest = max((len(pool) for pool in pools), default=0)
    return [pool[i] for i in range(longest) for pool in pools if i < len(pool)]


def _write_task(directory: Path, name: str, task: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (directory / f"{name}.jsonl").write_bytes(data)
    config = {
        "task": name,
        "dataset_path": "json",
        # a cache of its own, because these files will soon be gone
        "dataset_kwargs": {
            "data_files": {"test": str(directory / f"{name}.jsonl")},
            "cache_dir": str(directory / "cache"),
        },
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": f"{_RECIPE}+{hashlib.sha256(data).hexdigest()[:8]}"},
        **task,
    }
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

"""The columns that the prompts of the suites' tasks read."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Columns:
    """What a row must have; other columns are ignored.

    Attributes:
        text: columns of strings.
        integers: columns of integers: positions of words or characters.
        nested: columns of lists or of dicts of lists, which a CSV file cannot have.
        label: the column of the right answer's index, if there is one.
        names: what the data set calls the labels 0, 1, …
    """

    text: tuple[str, ...]
    integers: tuple[str, ...] = ()
    nested: tuple[str, ...] = ()
    label: str | None = "label"
    names: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        return (*self.text, *self.integers, *self.nested, *([self.label] if self.label else []))


_ENTAILED = ("entailment", "not_entailment")
_TRUE = ("False", "True")
_MNLI = Columns(("premise", "hypothesis"), names=("entailment", "neutral", "contradiction"))
_ARC = Columns(("question", "answerKey"), nested=("choices",), label=None)

COLUMNS: dict[str, Columns] = {
    # GLUE
    "cola": Columns(("sentence",), names=("unacceptable", "acceptable")),
    "mnli": _MNLI,
    "mnli_mismatch": _MNLI,
    "mrpc": Columns(("sentence1", "sentence2"), names=("not_equivalent", "equivalent")),
    "qnli": Columns(("question", "sentence"), names=_ENTAILED),
    "qqp": Columns(("question1", "question2"), names=("not_duplicate", "duplicate")),
    "rte": Columns(("sentence1", "sentence2"), names=_ENTAILED),
    "sst2": Columns(("sentence",), names=("negative", "positive")),
    "wnli": Columns(("sentence1", "sentence2"), names=("not_entailment", "entailment")),
    # SuperGLUE
    "boolq": Columns(("passage", "question"), names=_TRUE),
    "cb": Columns(("premise", "hypothesis"), names=("entailment", "contradiction", "neutral")),
    "copa": Columns(("premise", "choice1", "choice2", "question"), names=("choice1", "choice2")),
    "multirc": Columns(("paragraph", "question", "answer"), names=_TRUE),
    "record": Columns(("passage", "query"), nested=("entities", "answers"), label=None),
    "wic": Columns(("sentence1", "sentence2"), integers=("start1", "end1"), names=_TRUE),
    "wsc": Columns(("text", "span1_text", "span2_text"), integers=("span2_index",), names=_TRUE),
    "sglue_rte": Columns(("premise", "hypothesis"), names=_ENTAILED),
    # common sense and perplexity
    "hellaswag": Columns(("activity_label", "ctx_a", "ctx_b"), nested=("endings",), names=("0", "1", "2", "3")),
    "piqa": Columns(("goal", "sol1", "sol2"), names=("0", "1")),
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "winogrande": Columns(("sentence", "option1", "option2", "answer"), label=None),
    "openbookqa": Columns(("question_stem", "answerKey"), nested=("choices",), label=None),
    "lambada_openai": Columns(("text",), label=None),
    "wikitext": Columns(("page",), label=None),
}


def checked_row(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """The required columns of `row`, with strings, integers and labels as in the task's own data set.

    Raises:
        ValueError: a column is missing or empty, or of a kind that the prompts cannot read.
    """
    missing = [name for name in columns.required if row.get(name) is None]
    if missing:
        raise ValueError(
            f"column {', '.join(missing)} is missing; needed are {', '.join(columns.required)}, found {', '.join(row)}"
        )
    checked: dict[str, Any] = {name: _text(name, row[name]) for name in columns.text}
    checked |= {name: _integer(name, row[name]) for name in columns.integers}
    for name in columns.nested:
        if not isinstance(row[name], (list, dict)):
            raise ValueError(f"column {name} is {row[name]!r}, where the data set has a list or a dict of lists")
        checked[name] = row[name]
    if columns.label:
        checked[columns.label] = _label(columns.label, row[columns.label], columns.names)
    return checked


def _text(name: str, value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # such as winogrande's answers "1" and "2", which a file may have as numbers
    if not isinstance(value, str):
        raise ValueError(f"column {name} is {value!r}, where the data set has a string")
    return value


def _integer(name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"column {name} is {value!r}, where the data set has an integer") from None


def _label(name: str, value: Any, names: tuple[str, ...]) -> int:
    meaning = ", ".join(label if label == str(i) else f"{i} ({label})" for i, label in enumerate(names))
    if isinstance(value, str) and value.strip() in names:
        value = names.index(value.strip())
    try:
        label = int(value)
    except (TypeError, ValueError):
        raise ValueError(f"column {name} is {value!r}: use {meaning}") from None
    if label == -1:
        raise ValueError(f"column {name} is -1, as in a test split without its answers: use one that has them")
    if label != float(value) or not 0 <= label < len(names):
        raise ValueError(f"column {name} is {value!r}: use {meaning}")
    return label

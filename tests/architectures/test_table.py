"""What the table of architectures says of refusals, and that docs/architectures.md says what the table does."""

import re
from pathlib import Path

import pytest
from tiny_architectures import FAMILIES, REFUSED
from torch import nn

from hf_chts import SparsityConfig, SparsityHandle, sparsify

DOCS = Path(__file__).parents[2] / "docs/architectures.md"


def all_of(model: nn.Module) -> dict:
    """Classes, attributes and hooks of all modules, and hooks of all parameters, as they are now."""
    found = {}
    for name, module in model.named_modules():
        attributes = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        found[name] = (type(module), attributes)
    for name, parameter in model.named_parameters():
        found[f"{name} hooks"] = (dict(parameter._backward_hooks or {}), parameter._post_accumulate_grad_hooks)
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_touched(name):
    architecture = REFUSED[name]
    model = architecture.model()
    assert architecture.note
    model(**architecture.batch(2)).loss.backward()  # it is a model that can be trained
    before, weights = all_of(model), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=architecture.refused):
        sparsify(model, SparsityConfig())
    assert all_of(model) == before
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(after[key].equal(value) for key, value in weights.items())
    assert SparsityHandle.of(model) is None


def trained_line(architecture):
    kinds = dict.fromkeys(layer.rpartition(".")[2] for layer in architecture.expected())
    return f"| `{architecture.kind.__name__}` | {architecture.task.name} | {code(kinds)} | {architecture.note} |"


def refused_line(architecture):
    patterns = architecture.target_modules
    return f"| `{architecture.kind.__name__}` | {architecture.note} | {code(patterns) if patterns else 'none tried'} |"


def code(names):
    return " ".join(f"`{name}`" for name in names)


def lines(section, number):
    """The rows of a table of docs/architectures.md: the `number`th in the section of that title."""
    text = DOCS.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return tables[number].splitlines()[2:]


@pytest.mark.parametrize("number", range(len(FAMILIES)), ids=list(FAMILIES))
def test_the_docs_have_what_is_tested(number):
    title, family = list(FAMILIES.items())[number]
    rows = [row for row in family.values() if row.sparse and not row.refused]
    assert lines(title, 0) == [trained_line(row) for row in rows]


def test_the_docs_have_what_is_refused():
    assert lines("Refused", 0) == [refused_line(row) for row in REFUSED.values()]

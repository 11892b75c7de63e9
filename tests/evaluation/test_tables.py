import json
import math

import pytest

from hf_chts.evaluation import results_table, write_results
from hf_chts.evaluation.tables import column_names


def result(model, *, accuracy=0.3, limit=None, version="1", skipped=None, bits=1.25):
    return {
        "model": model,
        "tasks": {
            "lines": {"acc": accuracy, "acc_stderr": 0.0217},
            "text": {"bits_per_byte": bits, "word_perplexity": 123456.0},
        },
        "chance": {"lines": 0.25},
        "skipped": skipped or {},
        "config": {"limit": limit},
        "versions": {"tasks": {"lines": version}},
    }


def test_two_models_side_by_side():
    other = result("runs/b", accuracy=0.5)
    del other["tasks"]["text"]["word_perplexity"]
    lines = results_table([result("runs/a"), other]).split("\n")
    assert [line.split() for line in lines if "─" not in line] == [
        ["task", "metric", "chance", "a", "b"],
        ["lines", "acc", "0.2500", "0.3000", "±", "0.0217", "0.5000", "±", "0.0217"],
        ["text", "bits_per_byte", "1.2500", "1.2500"],
        ["word_perplexity", "1.235e+05", "–"],
    ]
    columns = [line.index("0.5000") for line in lines if "0.5000" in line]
    assert columns == [lines[0].index(" b") + 1]


@pytest.mark.parametrize("models", [1, 3, 9])
def test_text_fits_into_its_width_and_shows_every_model(models):
    results = [result(f"runs/{'long_' * 8}{i}/export", bits=i, skipped={"x" * 40: "y " * 60}) for i in range(models)]
    for width in (80, 100):
        table = results_table(results, width=width)
        assert max(map(len, table.split("\n"))) <= width
        assert all(f"{i}.0000" in table for i in range(models))


def test_markdown():
    lines = results_table([result("a|b"), result("c")], style="markdown").split("\n")
    assert lines[:3] == [
        "| task | metric | chance | a\\|b | c |",
        "| --- | --- | --- | ---: | ---: |",
        "| lines | acc | 0.2500 | 0.3000 ± 0.0217 | 0.3000 ± 0.0217 |",
    ]


def test_what_makes_columns_incomparable_is_said():
    table = results_table(
        [
            result("a", limit=10, version="1+aa", skipped={"cola": "no data", "rte": "no data"}),
            result("b", version="1+bb"),
        ]
    )
    assert "limit: 10, all" in table
    assert "lines is not the same in all columns: versions 1+aa, 1+bb" in table
    assert "Skipped cola, rte: no data" in table
    assert results_table([result("a"), result("b")]).count("\n") == 4  # and nothing else, if there is nothing to say


def test_names_are_short_and_distinct():
    assert column_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert column_names(["x/export", "y/export"]) == ["x/export", "y/export"]
    assert column_names(["x", "x"]) == ["1: x", "2: x"]
    names = column_names([f"{'n' * 50}{i}{'n' * 50}" for i in range(3)])
    assert len(set(names)) == 3
    assert max(map(len, names)) < 35


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_results([result("a", bits=math.nan)], path)
    (loaded,) = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert loaded["tasks"]["text"] == {"bits_per_byte": None, "word_perplexity": 123456.0}
    assert "not finite" in results_table([loaded])
    with pytest.raises(TypeError):
        write_results([result("b"), {"model": object()}], path)
    assert json.loads(path.read_text()) == [loaded]
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    with path.open() as reader:  # one who has begun to read the old file reads it to its end
        write_results([result("b")], path)
        assert json.load(reader) == [loaded]
    assert json.loads(path.read_text())[0]["model"] == "b"


def test_errors():
    with pytest.raises(ValueError, match="no results"):
        results_table([])
    with pytest.raises(ValueError, match="style='html'"):
        results_table([result("a")], style="html")

import json
import math

import pytest

from hf_chts.evaluation import results_table, write_report, write_results
from hf_chts.evaluation.figure import draw_results
from hf_chts.evaluation.tables import beats_trivial
from hf_chts.names import column_names
from hf_chts.text_table import text_table


def result(model, *, accuracy=0.3, limit=None, version="1", skipped=None, bits=1.25):
    return {
        "model": model,
        "suite": "lines,text",
        "tasks": {
            "lines": {"acc": accuracy, "acc_stderr": 0.0217},
            "text": {"bits_per_byte": bits, "word_perplexity": 123456.0},
        },
        "trivial": {"lines": {"acc": 0.25}},
        "skipped": skipped or {},
        "config": {"limit": limit},
        "versions": {"tasks": {"lines": version}},
    }


def cells(table):
    return [line.split() for line in table.split("\n") if line and "─" not in line]


def test_two_models_side_by_side():
    other = result("runs/b", accuracy=0.5)
    del other["tasks"]["text"]["word_perplexity"]
    table = results_table([result("runs/a"), other])
    lines = table.split("\n")
    assert cells(table)[:4] == [
        ["task", "metric", "trivial", "a", "b", "difference"],
        # 0.2 and 0.0217 · √2 = 0.0307
        ["lines", "acc", "0.2500", "0.3000±0.0217", "0.5000±0.0217", "+0.2000±0.0307*"],
        ["text", "bits_per_byte", "1.2500", "1.2500", "+0.0000"],
        ["word_perplexity", "1.235e+05", "–"],
    ]
    columns = [line.index("0.5000") for line in lines if "0.5000" in line]
    assert columns == [lines[0].index(" b") + 1]
    assert "difference: to runs/a" in table
    assert "not paired: lines, text" in table
    with_b_first = cells(results_table([result("runs/a"), other], baseline="runs/b"))
    assert with_b_first[0] == ["task", "metric", "trivial", "a", "difference", "b"]
    assert with_b_first[1][4] == "-0.2000±0.0307*"


def test_lines_of_a_table_are_plain_and_whole_wherever_they_are_written(monkeypatch):
    for name, value in {"COLUMNS": "20", "FORCE_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    lines = text_table([["[red]a[/]", ":smile:", "x" * 200], ["b", "12", ""]], ["name", "n", "text"], right=[1])
    assert lines == [
        "name             n  text",
        "─" * (9 + 2 + 7 + 2 + 200),
        f"[red]a[/]  :smile:  {'x' * 200}",
        "b               12",
    ]
    assert text_table([["a", "b"]]) == ["a  b"]


def test_marks_what_does_not_beat_the_trivial_score():
    rows = cells(results_table([result("a", accuracy=0.2718), result("b", accuracy=0.2716)]))
    assert rows[1][3:5] == ["0.2718±0.0217", "0.2716±0.0217·"]
    assert beats_trivial(0.1, None, None)
    assert beats_trivial(0.31, None, 0.3)
    assert not beats_trivial(0.3, None, 0.3)


def test_averages_are_rows():
    def glue(model, *values):
        named = zip(("cola", "rte", "sst2"), values, strict=False)
        scores = {task: {"acc": value, "acc_stderr": 0.03} for task, value in named}
        return result(model) | {"tasks": scores, "trivial": {task: {"acc": 0.5} for task in scores}, "suite": "glue"}

    rows = cells(results_table([glue("a", 0.5, 0.6, 0.9), glue("b", 0.6, 0.8)]))
    average = next(row for row in rows if row[1:4] == ["mean", "of", "2"])
    # over the two tasks that both have; 0.03 / √2 = 0.0212, and of the differences 0.03
    assert average == ["glue:", "mean", "of", "2", "acc", "0.5000", "0.5500±0.0212", "0.7000±0.0212", "+0.1500±0.0300*"]


def test_two_models_fit_into_100_characters():
    def wide(model, bits):
        scores = {"acc": 0.3222, "acc_stderr": 0.0156, "balanced_acc": -0.1234, "balanced_acc_stderr": 0.0156}
        rolling = {"bits_per_byte": bits, "bits_per_byte_stderr": 0.0123, "byte_perplexity": 731.8123}
        rolling |= {"byte_perplexity_stderr": 12.6, "word_perplexity": 5.1e14, "word_perplexity_stderr": 4.03e14}
        return result(model) | {"tasks": {"embedded_next_line": scores, "embedded_bits_per_byte": rolling}}

    for names in (("runs/chts/export", "runs/set/export"), ("n" * 40, "m" * 40)):
        table = results_table([wide(name, 1.5 + i) for i, name in enumerate(names)])
        assert max(map(len, table.split("\n"))) <= 100
        assert table.count("metric") == 1  # one block


@pytest.mark.parametrize("models", [1, 3, 9])
def test_text_fits_into_its_width_and_shows_every_model(models):
    results = [result(f"runs/{'long_' * 8}{i}/export", bits=i, skipped={"x" * 40: "y " * 60}) for i in range(models)]
    for width in (80, 100):
        table = results_table(results, width=width)
        assert max(map(len, table.split("\n"))) <= width
        assert all(f"{i}.0000" in table for i in range(models))


def test_markdown():
    lines = results_table([result("a|b"), result("c", accuracy=0.5)], style="markdown").split("\n")
    assert lines[:3] == [
        "| task | metric | trivial | a\\|b | c | difference |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| lines | acc | 0.2500 | 0.3000±0.0217 | 0.5000±0.0217 | +0.2000±0.0307\\* |",
    ]


def test_what_makes_columns_incomparable_is_said():
    table = results_table(
        [
            result("a", limit=10, version="1+aa", skipped={"cola": "no data", "rte": "no data"}),
            result("b", version="1+bb") | {"data": {"rte": "DIR/rte"}},
        ]
    )
    assert "limit: 10, all" in table
    assert "lines is not the same in all columns: versions 1+aa, 1+bb" in table
    assert "Skipped cola, rte: no data" in table
    assert "From local data files: rte." in table
    bare = result("a")
    del bare["trivial"]
    assert results_table([bare]).count("\n") == 4  # and nothing else, if there is nothing to say


def test_names_are_short_and_distinct():
    assert column_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert column_names(["x/export", "y/export"]) == ["x/export", "y/export"]
    assert column_names(["x", "x"]) == ["1: x", "2: x"]
    for widest in (13, 28):
        names = column_names([f"{'n' * 50}{i}{'n' * 50}" for i in range(3)], widest)
        assert len(set(names)) == 3
        assert max(map(len, names)) <= widest + 3


def test_a_file_of_results(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_results([result("a", bits=math.nan) | {"documents": {}}, result("b")], path)
    first, second = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert first["tasks"]["text"] == {"bits_per_byte": None, "word_perplexity": 123456.0}
    assert "documents" not in first
    assert second["difference"]["tasks"]["lines"]["acc"]["value"] == 0
    assert "not finite" in results_table([first, first])
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_report_is_beside_the_results(tmp_path):
    markdown, figure = write_report([result("a"), result("b")], tmp_path / "new" / "run.v2.json")
    assert (markdown.name, figure.name) == ("run.v2.md", "run.v2.png")
    text = markdown.read_text()
    assert results_table([result("a"), result("b")], style="markdown") in text
    assert "(run.v2.png)" in text
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in figure.parent.iterdir()) == ["run.v2.md", "run.v2.png"]
    with pytest.raises(ValueError, match="run.md is for the JSON file"):
        write_report([result("a")], tmp_path / "run.md")


def test_bars_have_the_scores_their_errors_and_the_trivial_score():
    figure = draw_results([result("a", accuracy=0.3, bits=math.inf), result("b", accuracy=0.5)])
    accuracy, bits, perplexity = figure.axes
    assert [bar.get_height() for bar in accuracy.patches] == [0.3, 0.5]
    ends = [[point[1] for point in line] for bars in accuracy.containers for line in _error_lines(bars)]
    assert ends == [pytest.approx([0.3 - 0.0217, 0.3 + 0.0217]), pytest.approx([0.5 - 0.0217, 0.5 + 0.0217])]
    trivial = next(lines for lines in accuracy.collections if lines.get_label() == "trivial")
    assert [segment[0][1] for segment in trivial.get_segments()] == [0.25]
    assert [label.get_text() for label in accuracy.get_xticklabels()] == ["lines"]
    assert math.isnan(bits.patches[0].get_height())
    assert bits.patches[1].get_height() == 1.25
    assert perplexity.get_ylabel().startswith("perplexity per word")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["trivial", "a", "b"]
    (text,) = draw_results([result("a") | {"tasks": {}}]).axes[0].texts
    assert text.get_text() == "no scores"


def _error_lines(bars):
    if not hasattr(bars, "errorbar"):
        return []
    return bars.errorbar.lines[2][0].get_segments()


def test_errors():
    with pytest.raises(ValueError, match="no results"):
        results_table([])
    with pytest.raises(ValueError, match="style='html'"):
        results_table([result("a")], style="html")
    with pytest.raises(ValueError, match="baseline='z'"):
        results_table([result("a")], baseline="z")

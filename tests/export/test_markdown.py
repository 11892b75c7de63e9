"""Text from outside is shown in Markdown as it is, and never read as markup."""

import html
import re

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt  # which rich needs too

from hf_chts import SparsityConfig
from hf_chts.evaluation.result_files import write_report
from hf_chts.evaluation.tables import results_table
from hf_chts.export.model_card import model_card
from hf_chts.export.model_facts import LayerFacts, ModelFacts
from hf_chts.export.pushed_card import with_figures, with_repository, with_results
from hf_chts.markdown import code, inline, picture

HOSTILE = [
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "![here](https://example.org/a.png)",
    "[here](javascript:alert(1)) and [there][1]",
    "a | b || c",
    "`code` and ``more` of it",
    "*strong* **stronger** _leaning_ __more__ ~~gone~~",
    "&lt;b&gt; &amp; &#60;",
    "\\<b> \\\\[a](b) \\",
    "<https://example.org> <!-- hidden",
    "$x^2$ $$y$$",
    "snake_case_name and _private",
    "größer_als ≤ 5",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_as_it_is(text):
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    page = reader.render(f"| a | b |\n| --- | --- |\n| {inline(text)} | {code(text)} |\n\n# {inline(text)}\n")
    cells = re.findall(r"<td>(.*?)</td>", page)
    assert len(cells) == 2
    assert html.unescape(cells[0]) == text
    assert html.unescape(re.fullmatch("<code>(.*)</code>", cells[1])[1]) == text
    assert "$" not in inline(text).replace("\\$", "")  # a formula on the Hub
    assert set(re.findall(r"</?(\w+)", page)) == {"table", "thead", "tbody", "tr", "th", "td", "code", "h1"}


def test_lines_end_where_they_are_meant_to():
    assert inline("a\n\n## b\r\n\u2028c\x00d") == "a  ## b   c d"
    assert code("a\nb") == "`a b`"


def test_pictures():
    assert picture("b c", "figures", "b_c.png") == "![b c](figures/b_c.png)"
    assert picture("a]b<i>", "figures", "a b)<i>.png") == "![a\\]b&lt;i&gt;](figures/a%20b%29%3Ci%3E.png)"


SCRIPT = "<script>alert(1)</script>|[x](y)"
SAFE = "&lt;script&gt;alert(1)&lt;/script&gt;\\|\\[x\\](y)"


def test_a_model_card():
    facts = ModelFacts(
        SCRIPT, SparsityConfig(method="set"), [LayerFacts("up`|<i>", (4, 10), 4)], {"model_type": SCRIPT}
    )
    results = {
        "tasks": {SCRIPT: {SCRIPT: 0.5}}, "skipped": {SCRIPT: "x"}, "config": {"limit": SCRIPT},
        "versions": {"lm_eval": SCRIPT},
    }  # fmt: skip
    text = model_card(facts, training={"run": SCRIPT, SCRIPT: 1, "schedule": [SCRIPT]}, metrics={SCRIPT: SCRIPT})
    card = ModelCard(with_figures(with_results(text, results), ["<i>(1).png"]))
    assert "<script>" not in card.text
    assert "<i>" not in card.text.replace("`` up`\\|<i> ``", "")  # which is code, and shown as it is
    assert (
        card.text.count(SAFE) == 13
    )  # title, summary, type; 3 of training; 2 of metrics; 2 of scores; limit, skipped, version
    assert "![&lt;i&gt;(1)](figures/%3Ci%3E%281%29.png)" in card.text
    assert f"| run | {SAFE} |" in card.text
    assert f"# {SAFE} · set" in card.text


def test_a_revision_in_the_code_of_a_card():
    text = with_repository("f(DIRECTORY_OR_HUB_ID)", "a/b", 'v"); import os; ("')
    assert text == 'f("a/b", revision="v\\"); import os; (\\"")'


def test_tables_of_results(tmp_path):
    rest = {"suite": "", "skipped": {}, "config": {"limit": None}, "versions": {"tasks": {}}}
    results = [{"model": f"{SCRIPT} $x_{n}^$", "tasks": {SCRIPT: {"acc": 0.5}}, **rest} for n in range(2)]
    table = results_table(results, style="markdown")
    assert "<script>" not in table
    assert SAFE in table
    markdown, figure = write_report(results, tmp_path / "a (b) <i>.json")
    assert "](a%20%28b%29%20%3Ci%3E.png)" in markdown.read_text()
    assert figure.stat().st_size > 1000  # the $ of a name is not read as a formula

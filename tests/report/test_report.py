"""The report: a page that is valid, accessible, whole and right, of runs that ended, go on, or left little behind."""

import json
import re
from itertools import pairwise

import pytest
from page_reader import Page
from short_runs import BITS, LOSSES, log_of, trained

from hf_chts.__main__ import main
from hf_chts.report import write_report

HOSTILE = "<script>alert(\"x\")& 'run'"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    names = {"chtss": HOSTILE, "set": "set", "dense": "dense"}
    return {case: trained(directory / name, case) for case, name in names.items()}


@pytest.fixture(scope="module")
def three(runs, tmp_path_factory):
    return write_report(list(runs.values()), tmp_path_factory.mktemp("report") / "new" / "three.html")


@pytest.fixture(scope="module")
def page(three):
    return Page(three.read_text())


def test_headings_go_down_a_level_at_a_time(page):
    levels = [int(element.tag[-1]) for element in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert page.texts("h2") == ["Summary", "Comparison", HOSTILE, "set", "dense"]


def test_every_picture_is_told_in_words(page):
    pictures = page.all("img")
    titles = page.texts("h3")
    assert len(pictures) == len(titles) > 20
    for title in ("Adjacency", "Degrees", "Schedules", "Exploration", "Links removed and regrown", "Overlap by layer",
                  "ITOP by layer", "Active neurons by layer", "Seconds spent on the topology"):  # fmt: skip
        assert titles.count(title) == 2, title  # of the two sparse runs
    assert titles.count("Loss and bits per byte") == 3
    for picture in pictures:
        assert len(picture.get("alt")) > 40
        assert "None" not in picture.get("alt")
        assert "nan" not in picture.get("alt")
        assert int(picture.get("width")) > 300
    alts = " ".join(picture.get("alt") for picture in pictures)
    assert "bits per byte falls from 3.06 at step 12 to 2.25 at step 24" in alts
    assert f"{HOSTILE}: bits per byte falls from 3.062 at step 12 to 2.251 at step 24" in alts


def test_nothing_is_asked_of_a_network(three, page):
    for element in page.root.iter():
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = element.get(name)
            assert value is None or value.startswith(("data:", "#")), value[:80]
    assert not page.all("script", "link", "iframe", "object", "form")
    assert not re.search(r"url\(|@import", page.texts("style")[0])
    assert "default-src 'none'" in three.read_text()
    assert three.stat().st_size < 5_000_000


def test_what_a_run_is_called_stays_text(three, page):
    assert "<script" not in three.read_text()
    assert HOSTILE in page.texts("th")
    assert page.all("title")[0].text == "3 runs side by side · hf_chts"


def test_links_within_the_page_lead_somewhere(page):
    targets = {element.get("id") for element in page.root.iter() if element.get("id")}
    links = [element.get("href") for element in page.all("a")]
    assert len(links) == 5
    assert {link.removeprefix("#") for link in links} <= targets


def test_the_summary_has_the_figures_of_the_logs(page, runs):
    table = page.table()
    cases = list(runs)
    assert table["Figure"] == [HOSTILE, "set", "dense"]
    assert table["Method"] == cases
    assert table["Steps"] == ["24"] * 3
    assert table["Sparsity"] == ["90.00%", "90.00%", "0.00%"]
    assert table["Bits per byte"] == ["2.2512", "2.3034+0.0522", "2.1987−0.0525"]
    assert table["Validation loss"] == ["4.5411", "4.6222+0.0811", "4.4018−0.1393"]
    training = [[entry["loss"] for entry in log_of(path) if "loss" in entry][-1] for path in runs.values()]
    assert [float(cell[:6]) for cell in table["Training loss"]] == [round(loss, 4) for loss in training]
    itop = [[entry["itop"] for entry in log_of(runs[case]) if "itop" in entry] for case in ("chtss", "set")]
    assert [float(cell[:6]) for cell in table["ITOP"][:2]] == [round(rates[-1], 4) for rates in itop]
    assert table["ITOP"][2] == "–"
    assert table["Updates"] == ["4", "4", "0"]
    for index, case in enumerate(("chtss", "set")):
        spent = sum(entry.get("topology_seconds", 0) for entry in log_of(runs[case]))
        lines = [json.loads(line) for line in (runs[case] / "topology/seconds.jsonl").read_text().splitlines()]
        whole = sum(line["seconds"] for line in lines)
        assert float(re.match(r"\d+\.\d", table["Seconds on topology"][index])[0]) == round(spent, 1)
        assert table["Share of the time"][index] == f"{spent / whole:.1%}"
    assert BITS["set"] - BITS["chtss"] == pytest.approx(0.0522)
    assert LOSSES["dense"] - LOSSES["chtss"] == pytest.approx(-0.1393)


def test_figures_lie_beside_the_page(three):
    figures = {path.name: path.read_bytes() for path in (three.parent / "three_figures").iterdir()}
    assert {"compared_loss.png", "compared_bits_per_byte.png", "set-adjacency.png", "dense-loss.png"} <= set(figures)
    assert len(figures) == len(Page(three.read_text()).all("img"))
    assert all(name.endswith(".png") and data.startswith(b"\x89PNG") for name, data in figures.items())


def test_one_run_by_the_command(runs, capsys):
    main(["report", str(runs["dense"])])
    path = runs["dense"] / "report.html"
    assert str(path) in capsys.readouterr().out
    page = Page(path.read_text())
    assert page.texts("h1") == ["Report of dense"]
    assert page.texts("h2") == ["Summary", "Figures"]
    assert [text for text in page.texts("li") if "dense" in text] == ["The run is dense: it has no topology to show."]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", "nothing is not a directory"),
        ("empty", "empty holds no run: there is no trainer_state.json"),
        ("twice", "was given twice"),
        ("pattern", "no layer of .* has a name like '\\*.x'"),
        ("target", "is a directory: name the HTML file"),
    ],
)
def test_what_is_refused(tmp_path, runs, what, message):
    (tmp_path / "empty").mkdir()
    arguments = {
        "nothing": [tmp_path / "nothing"],
        "empty": [tmp_path / "empty"],
        "twice": [runs["set"], runs["dense"] / ".." / "set"],
        "pattern": [runs["set"], "--layers", "*.x"],
        "target": [runs["set"], "--output", tmp_path / "empty"],
    }[what]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"hf-chts report: .*{message}"):
        main(["report", *map(str, arguments)])
    assert sorted(tmp_path.rglob("*")) == before

"""The page of a study, of result files made by hand, and that docs/results.md is what files and notes give."""

import math
import re
from pathlib import Path

import matplotlib.image
import pytest

from hf_chts.studies import page
from hf_chts.studies.curves import Course, columns, course
from hf_chts.studies.figures import Figure, curves_of, figures_of, papers_figure
from hf_chts.studies.page_results import StudyResults
from hf_chts.studies.page_tables import main_table
from hf_chts.studies.statistics import Estimate
from hf_chts.studies.study import Study
from hf_chts.studies.tasks import TASKS

ROOT = Path(__file__).parents[2]


def cells(text, first):
    """The cells of the rows of tables whose first cell begins so."""
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()]
    return [row for row in rows if row and row[0].startswith(first)]


def written(made, **options):
    return page.write_page(made.load(**options), made.results).read_text(encoding="utf-8")


@pytest.fixture
def done(made):
    """Half of a study: two seeds of three rows, none of the fourth."""
    for seed, (dense, sparse, chts) in enumerate([(50.0, 51.0, 60.0), (54.0, 57.0, 60.5)]):
        made.add(f"dense-{seed}", {"score": dense, "loss": 2.0 + seed, "links": 1e6}, processor_seconds=100.0)
        made.add(f"set-{seed}", {"score": sparse, "loss": 5.0, "links": 12345.0})
        made.add(f"chts-{seed}", {"score": chts, "loss": 1.0 + seed / 10, "links": 12345.0})
    return made


def test_the_table_has_means_errors_and_the_papers_figures(done):
    text = written(done)
    head = cells(text, "")[0]
    assert head[1:7] == ["seeds", "score, % ↑", "loss ↓", "links", "paper: loss", "ours − paper"]
    # score 50 and 54: mean 52, error √8/√2 = 2; loss 2 and 3: error 0.5, and to the paper's 2 ± 0.25 √(0.5² + 0.25²)
    (dense,) = cells(text, "dense")
    assert dense[1:7] == ["2 of 3", "52.00 ± 2.00", "2.500 ± 0.500", "1,000,000", "2.000 ± 0.250", "+0.500 ± 0.559"]
    (sparse,) = cells(text, "SET")
    assert sparse[:7] == [
        "SET (`set`)", "2 of 3", "54.00 ± 3.00", "5.000 ± 0.000", "12,345", "3.000", "+2.000"
    ]  # fmt: skip  # the paper gives no error, so that the difference has none
    (chts,) = cells(text, "CHTs")
    assert chts[0] == r"CHTs \| a (`chts`)"
    assert chts[6] == "+0.050 ± 0.502"
    assert dense[7:] == ["100", "20", "500", "100"]
    assert sparse[7:] == ["10", "20", "500", "100"]
    assert cells(text, "gmp")[0][1:] == ["0 of 1", *[""] * 9]


def test_groups_are_in_the_order_of_the_file(done):
    first = [
        row[0] for row in cells(main_table(StudyResults.read(done.load(), done.results), figures_of("played")), "")
    ]
    assert first[2:] == [
        "dense", "**fixed density**", "SET (`set`)", r"CHTs \| a (`chts`)", "**density decay**", "gmp"
    ]  # fmt: skip


def test_what_is_missing_is_said(done):
    assert "Missing are 4 of 10 runs: gmp 0; dense 2; set 2; chts 2." in written(done)


def test_nothing_done_yet_has_a_page(made):
    text = written(made.write(reference="dense"))
    assert "No run is done yet" in text
    assert "Missing are 10 of 10 runs." in text
    assert not (made.results / "made.png").exists()


def test_results_of_other_settings_do_not_count(done):
    done.add("chts-0", {"score": 1e6}, settings={"base": 3})
    text = written(done)
    assert "Left out, as they ran with other settings: chts 0." in text
    assert cells(text, "CHTs")[0][1:3] == ["1 of 3", "60.50"]


def test_results_of_no_row_are_named(done):
    (done.results / "chts-1.json").rename(done.results / "old-1.json")
    assert "Of no row of the study: `old-1`" in written(done)


def test_one_seed_has_no_error_and_no_star(made):
    made.add("chts-0", {"score": 60.0, "loss": 50.0})
    row = cells(written(made), "CHTs")[0]
    assert row[1:6] == ["1 of 3", "60.00", "50.000", "1.000 ± 0.500", "+49.000"]


def test_what_is_not_finite_is_said_and_not_averaged(done):
    done.add("set-2", {"score": None, "loss": None, "links": None})
    row = cells(written(done), "SET")[0]
    assert row[1:3] == ["3 of 3", "54.00 ± 3.00 (1 not finite)"]
    assert row[4] == "12,345"  # only describes the run: nothing went wrong


def test_numbers_that_are_not_finite(made):
    """As an earlier version, or another program, may have written them."""
    made.add("chts-0", {"score": math.nan, "loss": math.inf}, {"epoch": [1, 2], "score": [math.nan, 2.0]})
    made.add("set-0", {"score": 3.0, "loss": 1.0}, {"epoch": [1, 2], "score": [math.nan, math.nan]})
    text = written(made)
    assert "not finite" in text
    assert not re.search(r"\b(nan|inf)\b", text.lower())


def test_a_result_without_a_field_is_named(made):
    made.add("set-0", {"score": 1.0}, memory_mib={"peak": 1.0})
    with pytest.raises(ValueError, match="set-0.json is not the result of a run, it has no 'before_training'"):
        written(made)


def test_a_file_that_is_no_result_is_named(done):
    (done.results / "set-2.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="set-2.json is not the result of a run"):
        written(done)
    (done.results / "set-2.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="set-2.json is not the result of a run, it has no 'settings'"):
        written(done)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"settings": None}, "settings are None"),
        ({"figures": []}, r"figures are \[\]"),
        ({"figures": {"score": "high"}}, "score is 'high'"),
        ({"seconds": None}, "seconds is None"),
        ({"curves": [1]}, r"curves are \[1\]"),
        ({"curves": {"epoch": [1, 2], "score": [1.0]}}, "curves have different numbers of points"),
        ({"machine": {"device": "x", "threads": 1, "capability": "y", "versions": {"torch": 2}}}, "are not text"),
        ({"seed": 1}, "the result of set-1, and not of set-2"),
        ({"row": "chts"}, "the result of chts-2, and not of set-2"),
    ],
)
def test_a_result_that_is_damaged_or_another_runs_is_named(done, fields, said):
    done.add("set-2", **{"figures": {"score": 1.0}, **fields})
    with pytest.raises(ValueError, match=f"set-2.json is .*{said}"):
        written(done)


def test_paired_differences(done):
    done.write(reference="dense")
    text = written(done)
    assert "Minus dense, seed by seed" in text
    row = cells(text, "SET")[1]
    # scores 51 − 50 and 57 − 54: 1 and 3, mean 2, error 1; losses 5 − 2 and 5 − 3: 3 and 2; 100 s against 10
    assert row[1:] == ["2", "+2.00 ± 1.00", "+2.500 ± 0.500", "10 ×"]
    assert len(cells(text, "dense")) == 1  # not compared with itself
    assert len(cells(text, "gmp")) == 1


def test_stars_are_of_three_seeds_or_more(done):
    done.write(reference="dense")
    done.add("dense-2", {"score": 50.0, "loss": 2.0})
    done.add("set-2", {"score": 55.0, "loss": 7.0})
    row = cells(written(done), "SET")[1]
    # scores 1, 3 and 5: mean 3, error 2/√3, 2.6 of them; losses 3, 2 and 5: mean 3.33, error √(7/9), 3.8 of them
    assert row[1:4] == ["3", r"+3.00 ± 1.15 \*", r"+3.333 ± 0.882 \*"]
    done.add("set-2", {"score": 53.0, "loss": 4.5})
    # scores 1, 3, 3: 2.33 ± 0.67, 3.5 errors; losses 3, 2, 2.5: 2.5 ± 0.289, 8.7 errors
    assert cells(written(done), "SET")[1][2:4] == [r"+2.33 ± 0.67 \*", r"+2.500 ± 0.289 \*\*"]


def test_a_difference_of_one_shared_seed_has_no_error(done):
    (done.results / "dense-0.json").unlink()
    row = cells(written(done.write(reference="dense")), "SET")[1]
    assert row[1:4] == ["1", "+3.00", "+2.000"]


def test_several_references_have_a_table_each(done):
    text = written(done.write(reference=["dense", "set"]))
    assert text.index("Minus dense") < text.index("Minus SET")
    assert cells(text, "dense")[1][2] == "−2.00 ± 1.00"


def test_a_reference_that_has_not_run_yet(done):
    assert "nothing to compare seed by seed yet" in written(done.write(reference="gmp"))


def test_order_in_a_group_beside_the_papers(done):
    done.add("set-2", {"score": 1.0, "loss": 5.0})
    done.add("chts-2", {"score": 1.0, "loss": 1.0})
    text = written(done)
    # losses of CHTs minus SET: −4, −3.9 and −4, outside; less is better
    assert r"- fixed density: CHTs \| a > SET; in the paper CHTs \| a, SET" in text
    for seed, loss in enumerate((4.0, 7.0, 5.5)):
        done.add(f"chts-{seed}", {"score": 1.0, "loss": loss})
    # differences −1, 2 and 0.5: mean 0.5, error 1.5/√3
    assert r"- fixed density: SET ≈ CHTs \| a; in the paper CHTs \| a, SET" in written(done)
    (done.results / "set-1.json").unlink()  # two are left
    assert r"- fixed density: SET ? CHTs \| a; in the paper" in written(done)


def test_runs_have_command_machine_versions_seeds_and_total_time(done):
    text = written(done)
    assert "- Command: `hf-chts study made.yaml`; `--row NAME` runs one row alone" in text
    assert "- Seeds: 0, 1\n" in text
    assert "- Machine: A processor, 1 thread, AVX2; hf_chts 1, torch 2\n" in text
    # 2 × 100 s and 4 × 10 s of processor, 6 × 20 s of wall clock
    assert "- Time: 4 min of processors and 2 min of wall clock in training, 6 runs together" in text


def test_runs_on_different_machines_are_told_apart(done):
    machine = {"device": "Another", "threads": 2, "capability": "AVX512", "versions": {"torch": "3"}}
    done.add("chts-1", {"score": 1.0, "loss": 1.0}, machine=machine, command="hf-chts study other.yaml")
    text = written(done)
    assert "Another, 2 threads, AVX512; torch 3 (chts 1)" in text
    assert "torch 2 (dense 0, 1; set 0, 1; chts 0)" in text
    assert "`hf-chts study other.yaml` (chts 1)" in text


def test_a_device_has_a_column_for_its_memory(done):
    memory = {"peak": 900.0, "before_training": 400.0, "of_device": 2048.0}
    done.add("chts-1", {"score": 1.0, "loss": 1.0}, memory_mib=memory)
    text = written(done)
    assert cells(text, "CHTs")[0][-5:] == ["10; 10 on A processor", "20; 20 on A processor", "500", "100", "2,048"]
    assert cells(text, "SET")[0][-3:] == ["500", "100", ""]


def test_a_run_on_a_gpu_and_one_on_a_cpu_are_not_compared_by_their_time(done):
    memory = {"peak": 900.0, "before_training": 400.0, "of_device": 2048.0}
    done.add("dense-1", {"score": 54.0, "loss": 3.0}, memory_mib=memory, processor_seconds=1.0)
    done.write(reference="dense")
    assert cells(written(done), "SET")[1][-1] == "10 ×"  # seed 0: 100 s and 10 s
    done.add("dense-0", {"score": 50.0, "loss": 2.0}, memory_mib=memory, processor_seconds=1.0)
    assert cells(written(done), "SET")[1][-1] == ""


class TestCurves:
    def test_the_mean_is_over_points_that_all_seeds_have(self, made):
        made.add("chts-0", {}, {"epoch": [1, 2, 3], "score": [10.0, 20.0, 30.0]})
        made.add("chts-1", {}, {"epoch": [1, 2, 4], "score": [14.0, 30.0, 99.0]})
        made.add("chts-2", {}, {"epoch": [1, 2, 3], "score": [12.0, None, 30.0]})
        found = StudyResults.read(made.load(), made.results)
        assert course(found, "chts", "score") == Course((1,), (12.0,), (10.0,), (14.0,))
        assert course(found, "chts", "itop") is None
        assert course(found, "dense", "score") is None

    def test_the_reference_is_in_no_column_and_a_long_group_is_divided(self, made):
        rows = {f"row{n}": {"group": "many" if n else ""} for n in range(9)}
        made.write(rows=rows, reference="row0", seeds=[0])
        for row in rows:
            made.add(f"{row}-0", {"score": 1.0}, {"epoch": [1, 2], "score": [1.0, 2.0]})
        parts = columns(StudyResults.read(made.load(), made.results))
        assert [(title, len(rows)) for title, rows in parts] == [("many", 6), ("many", 2)]

    def test_the_figure_is_beside_the_page_and_in_words(self, made):
        curves = {"epoch": [1, 2, 3], "score": [1.0, 2.0, 3.0], "itop": [0.1, 0.1, 0.2], "other": [7, 7, 7]}
        made.add("chts-0", {"score": 3.0}, curves)
        made.add("dense-0", {"score": 3.0}, {"epoch": [1], "score": [4.0]})
        text = written(made.write(reference="dense"))
        assert matplotlib.image.imread(made.results / "made.png").ndim == 3
        assert r"![Curves of score, %, ITOP. score, % ends at: dense 4; CHTs \| a 3.](made.png)" in text

    def test_the_same_results_are_the_same_figure(self, made):
        made.add("chts-0", {"score": 3.0}, {"epoch": [1, 2], "score": [1.0, 2.0]})
        written(made)
        before = (made.results / "made.png").read_bytes()
        written(made)
        assert (made.results / "made.png").read_bytes() == before


class TestFigures:
    def test_numbers_as_text(self):
        figure = Figure("accuracy", "%", better="higher")
        assert figure.difference(Estimate(-0.4, 0.1, 3)) == "−0.40 ± 0.10 *"
        assert figure.difference(Estimate(-0.0001, 0.1, 3)) == "0.00 ± 0.10"
        assert figure.difference(None) == figure.estimate(None) == ""
        assert figure.estimate(Estimate(90.0, 0.0, 3)) == "90.00 ± 0.00"
        assert Figure("links", digits=0).estimate(Estimate(61465.0, 0.0, 3)) == "61,465"

    @pytest.mark.parametrize("task", sorted(TASKS))
    def test_every_task_says_what_its_page_shows(self, task):
        figures = figures_of(task)
        assert figures[next(iter(figures))].better
        assert figures[papers_figure(figures)].better
        assert curves_of(task)

    def test_a_task_that_does_not_say(self, monkeypatch):
        monkeypatch.setitem(TASKS, "played", "json")
        with pytest.raises(ValueError, match="json has no FIGURES"):
            figures_of("played")
        with pytest.raises(ValueError, match="unknown task 'playd'; did you mean 'played'"):
            figures_of("playd")


class TestDocs:
    def page(self, made, notes):
        return page.docs_page(notes, made.folder, made.folder / "docs" / "page.md")

    def test_markers_are_filled_in(self, done):
        done.add("chts-0", {"score": 60.0, "loss": 1.0}, {"epoch": [1, 2], "score": [1.0, 2.0]})
        done.write(reference="dense")
        text = self.page(done, "# R\n\n<!-- table made -->\n\n<!-- curves made -->\n\nTime: <!-- total -->.\n")
        assert "# R\n\n|  | seeds |" in text
        assert "](../results/made/made.png)" in text
        assert text.endswith("Time: 4 min of processors and 2 min of wall clock in training, 6 runs together.\n")
        assert "Minus dense" not in text
        assert "Minus dense" in self.page(done, "<!-- differences made -->")
        whole = self.page(done, "<!-- study made -->")
        assert all(part in whole for part in ("|  | seeds |", "Minus dense", "made.png", "- Machine: "))
        assert "standard error" in self.page(done, "<!-- legend -->")

    @pytest.mark.parametrize("marker", ["<!-- tables made -->", "<!-- table -->", "<!-- total made -->"])
    def test_an_unknown_marker_is_refused(self, done, marker):
        with pytest.raises(ValueError, match=f"unknown marker {marker} in the notes"):
            self.page(done, marker)

    def test_an_unknown_study_is_refused(self, done):
        with pytest.raises(ValueError, match="unknown study in a marker of the notes 'mad'; did you mean 'made'"):
            self.page(done, "<!-- table mad -->")

    def test_the_command_writes_all_pages(self, done, capsys):
        (done.folder / "notes.md").write_text("<!-- table made -->\n", encoding="utf-8")
        docs = done.folder / "docs" / "results.md"
        page.main(["--studies", str(done.folder), "--docs", str(docs)])
        assert docs.read_text(encoding="utf-8") == self.page(done, "<!-- table made -->\n")
        assert (done.results / "made.md").is_file()
        assert capsys.readouterr().out.splitlines() == [str(done.results / "made.md"), str(docs)]

    def test_the_command_elsewhere(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            page.main(["--studies", str(tmp_path)])
        assert "run it in the root of a clone" in capsys.readouterr().err

    def test_the_page_in_the_repository_is_what_results_and_notes_give(self):
        notes = (ROOT / "studies/notes.md").read_text(encoding="utf-8")
        docs = ROOT / "docs/results.md"
        made = page.docs_page(notes, ROOT / "studies", docs)
        assert docs.read_text(encoding="utf-8") == made, "run python -m hf_chts.studies.page"
        for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", made):
            assert (docs.parent / path).is_file(), f"{path} is missing: run python -m hf_chts.studies.page"
        for path in (ROOT / "studies/results").iterdir():
            found = StudyResults.read(Study.load(ROOT / f"studies/{path.name}.yaml"), path)
            written = (path / f"{path.name}.md").read_text(encoding="utf-8")
            assert written == page.page_text(found), "run python -m hf_chts.studies.page"

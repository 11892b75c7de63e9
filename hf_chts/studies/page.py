"""Pages of studies, made of their result files.

    python -m hf_chts.studies.page [--studies studies] [--docs docs/results.md]

writes the page and the figure of every study of that folder that has results, and makes the docs' page of its notes.md
with the markers in it filled in: `<!-- table NAME -->`, `<!-- differences NAME -->`, `<!-- curves NAME -->` and
`<!-- runs NAME -->` of the study NAME.yaml, `<!-- study NAME -->` for all four, `<!-- legend -->` for what the tables
mean, `<!-- total -->` for the machine time of all studies.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hf_chts.config_checks import unknown
from hf_chts.files.atomic import write_whole
from hf_chts.markdown import code, inline, picture
from hf_chts.studies import curves
from hf_chts.studies.figures import curves_of, figures_of
from hf_chts.studies.page_results import Result, StudyResults
from hf_chts.studies.page_tables import LEGEND, differences, main_table, orders
from hf_chts.studies.study import Study

_MADE = "<!-- made by python -m hf_chts.studies.page from studies/notes.md and studies/results: edit those -->\n"
_MARKER = re.compile(r"<!-- *(\w+)(?: +([\w-]+))? *-->")


def write_page(study: Study, folder: Path) -> Path:
    """Write NAME.md and, if any run has curves, NAME.png into a study's folder of results. Returns the page's path.

    Raises:
        ValueError: a file in the folder is not a result.
    """
    found = StudyResults.read(study, folder)
    name = page_name(study)
    drawn = curves.encoded_figure(found, curves_of(study.task))
    if drawn is not None:
        write_whole(folder / f"{name}.png", drawn)
    write_whole(folder / f"{name}.md", page_text(found))
    return folder / f"{name}.md"


def page_name(study: Study) -> str:
    """The stem of the names of a study's page and figure."""
    return f"{study.name}-quick" if study.quick else study.name


def page_text(found: StudyResults) -> str:
    """The page of a study."""
    study = found.study
    title = f"# {inline(study.title)}{' (short form)' if study.quick else ''}"
    return "\n\n".join([title, whole_section(found, f"{page_name(study)}.png"), LEGEND]) + "\n"


def table_section(found: StudyResults) -> str:
    """The main table, what is missing of it, and the order of its rows."""
    figures = figures_of(found.study.task)
    table = main_table(found, figures) if found.results else "*No run is done yet.*"
    return _joined([table, orders(found, figures), _gaps(found)])


def differences_section(found: StudyResults) -> str:
    """A table for each of the study's references; "" if it has none."""
    study, figures = found.study, figures_of(found.study.task)
    tables = _joined([differences(found, figures, reference) for reference in study.references])
    return tables or ("*There is nothing to compare seed by seed yet.*" if study.references else "")


def curves_section(found: StudyResults, path: str) -> str:
    """The figure, which is at `path` seen from the page."""
    titles = curves_of(found.study.task)
    if not curves.drawn(found, titles):
        return "*There are no curves yet.*"
    return f"{picture(curves.in_words(found, titles), path)}\n\n{curves.CAPTION}"


def runs_section(found: StudyResults) -> str:
    """Commands, seeds, machines, versions and the time of all runs."""
    results = found.results
    if not results:
        return "*No run is done yet.*"
    commands = ", ".join(f"{code(command)}{of}" for command, of in _shared(results, lambda r: r["command"]))
    machines = "; ".join(f"{inline(machine)}{of}" for machine, of in _shared(results, _machine))
    seeds = _shared(results, lambda result: str(result["seed"]), of_whom=False)
    lines = [
        f"- Command: {commands}; `--row NAME` runs one row alone",
        f"- Seeds: {', '.join(seed for seed, _ in seeds)}",
        f"- Machine: {machines}",
        f"- Time: {total_time(results)}",
    ]
    return "\n".join(lines)


def whole_section(found: StudyResults, path: str) -> str:
    """All sections. `path`: where the figure is, seen from the page."""
    return _joined([table_section(found), differences_section(found), curves_section(found, path), runs_section(found)])


def total_time(results: Sequence[Result]) -> str:
    """The time of all runs together, in words."""
    processor, wall = (sum(result[name] for result in results) for name in ("processor_seconds", "seconds"))
    count = f"{len(results)} run{'s' if len(results) != 1 else ''}"
    return f"{_duration(processor)} of processors and {_duration(wall)} of wall clock in training, {count} together"


def docs_page(notes: str, studies: Path, docs: Path) -> str:
    """The text of the docs' page.

    Args:
        notes: a text with markers, as the module says.
        studies: the folder of studies, with the results in `results/NAME`.
        docs: where the page will be; links to figures are relative to it.

    Raises:
        ValueError: a marker is unknown, or names a study that is not there.
    """
    known = {path.stem: path for path in sorted(studies.glob("*.yaml"))}
    read: dict[str, StudyResults] = {}

    def results(name: str) -> StudyResults:
        if name not in known:
            raise ValueError(unknown("study in a marker of the notes", name, known))
        if name not in read:
            read[name] = StudyResults.read(Study.load(known[name]), studies / "results" / name)
        return read[name]

    def drawing(name: str) -> str:
        path = studies / "results" / name / f"{name}.png"
        return Path(os.path.relpath(path, docs.parent)).as_posix()

    of_study: dict[str, Callable[[str], str]] = {
        "study": lambda name: whole_section(results(name), drawing(name)),
        "table": lambda name: table_section(results(name)),
        "differences": lambda name: differences_section(results(name)),
        "curves": lambda name: curves_section(results(name), drawing(name)),
        "runs": lambda name: runs_section(results(name)),
    }
    of_all = {"legend": lambda: LEGEND, "total": lambda: total_time([r for n in known for r in results(n).results])}

    def filled(marker: re.Match[str]) -> str:
        kind, name = marker.groups()
        if kind in of_study and name:
            return of_study[kind](name)
        if kind in of_all and not name:
            return of_all[kind]()
        raise ValueError(
            f"unknown marker {marker[0]} in the notes: write {', '.join(of_study)} with the name of a study, or "
            f"{', '.join(of_all)} alone"
        )

    return _MADE + _MARKER.sub(filled, notes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=Path, default=Path("studies"), metavar="DIR", help="(default: studies)")
    parser.add_argument("--docs", type=Path, default=Path("docs/results.md"), metavar="FILE")
    given = parser.parse_args(arguments)
    notes = given.studies / "notes.md"
    if not notes.is_file():
        parser.error(f"there is no {notes}: run it in the root of a clone, or name the folder with --studies")
    for path in sorted(given.studies.glob("*.yaml")):
        folder = given.studies / "results" / path.stem
        if folder.is_dir():
            print(write_page(Study.load(path), folder))
    write_whole(given.docs, docs_page(notes.read_text(encoding="utf-8"), given.studies, given.docs))
    print(given.docs)


def _gaps(found: StudyResults) -> str:
    """What is missing, in words; "" if everything is there."""
    parts = []
    if found.missing:
        count = len(found.study.runs(Path()))
        which = f": {_named((run.row, run.seed) for run in found.missing)}" if found.results else ""
        parts.append(f"Missing are {len(found.missing)} of {count} runs{which}.")
    if found.changed:
        changed = _named((run.row, run.seed) for run in found.changed)
        parts.append(f"Left out, as they ran with other settings: {changed}.")
    if found.others:
        parts.append(f"Of no row of the study: {', '.join(map(code, found.others))}.")
    return " ".join(parts)


def _machine(result: Result) -> str:
    machine = result["machine"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['device']}, {threads}, {machine['capability']}; {versions}"


def _shared(results: Sequence[Result], say: Callable[[Result], str], of_whom: bool = True) -> list[tuple[str, str]]:
    """The different things that `say` says of results, each with the runs of which it does if it is not all of them."""
    found: dict[str, list[tuple[str, int]]] = {}
    for result in results:
        found.setdefault(say(result), []).append((result["row"], result["seed"]))
    if len(found) == 1 or not of_whom:
        return [(said, "") for said in sorted(found)]
    return [(said, f" ({_named(runs)})") for said, runs in found.items()]


def _named(runs: Iterable[tuple[str, int]]) -> str:
    """Rows and seeds of runs, such as "dense 0, 1; set 2"."""
    rows: dict[str, list[str]] = {}
    for row, seed in runs:
        rows.setdefault(row, []).append(str(seed))
    return "; ".join(f"{inline(row)} {', '.join(seeds)}" for row, seeds in rows.items())


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part)


if __name__ == "__main__":
    main()

"""The report as one HTML page that asks for nothing beyond itself."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any

from hf_chts.report.drawing import Drawing
from hf_chts.report.run import Run
from hf_chts.report.stylesheet import STYLESHEET
from hf_chts.report.summary import Row

# Browsers then refuse whatever is not in the page, should any text of a run ever get in as more than text
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(
    runs: Sequence[Run],
    rows: Sequence[Row],
    comparison: Sequence[Drawing],
    drawings: Sequence[Sequence[Drawing]],
    written: datetime,
) -> str:
    """The page, of the summary's rows, of the figures of all runs together, and of those of each run."""
    several = len(runs) > 1
    title = f"{len(runs)} runs side by side" if several else f"Report of {runs[0].label}"
    sections = [("summary", "Summary", [_summary(runs, rows), *_shared_notes(runs)])]
    if several and comparison:
        sections.append(("comparison", "Comparison", [_figures(comparison)]))
    for number, (run, own) in enumerate(zip(runs, drawings, strict=True), 1):
        heading = run.label if several else "Figures"
        sections.append((f"run-{number}", heading, _run(run, own, several)))
    links = "".join(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, heading, _ in sections)
    body = "\n".join(
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(heading)}</h2>\n{"".join(parts)}</section>'
        for name, heading, parts in sections
    )
    iso = written.isoformat(timespec="minutes")
    date = f'<time datetime="{iso}">{iso.replace("T", " ")}</time>'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="color-scheme" content="light">
<meta name="generator" content="hf_chts">
<title>{escape(title)} · hf_chts</title>
<style>{STYLESHEET}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="muted">Sparse training with hf_chts. Written {date}.</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<footer><p>This file is whole: it loads nothing from elsewhere. The figures lie beside it as PNG files too.</p></footer>
</body>
</html>
"""


def _summary(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    heads = "".join(f'<th scope="col">{escape(run.label)}</th>' for run in runs)
    lines = "\n".join(
        f'<tr><th scope="row">{escape(row.name)}</th>'
        + "".join(_cell(cell, apart) for cell, apart in zip(row.cells, row.differences, strict=True))
        + "</tr>"
        for row in rows
    )
    caption = "Last figures of each run."
    if len(runs) > 1:
        caption += f" Below them, the difference from {runs[0].label}."
    return (
        f'<div class="scroll" role="region" aria-label="Summary of the runs" tabindex="0">\n<table>\n'
        f'<caption>{escape(caption)}</caption>\n<thead><tr><th scope="col">Figure</th>{heads}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody>\n</table>\n</div>\n"
        '<p class="muted">ITOP: the share of possible links that were ever active. Losses are in nats per token. '
        "Seconds on topology are those of all updates so far; a dash stands for what is not known.</p>\n"
    )


def _cell(cell: str, difference: str) -> str:
    apart = f'<span class="difference">{escape(difference)}</span>' if difference else ""
    return f"<td>{escape(cell)}{apart}</td>"


def _shared_notes(runs: Sequence[Run]) -> Iterable[str]:
    unlike = [key for key in ("vocab_size", "hidden_size", "num_hidden_layers") if _differ(runs, key)]
    if unlike:
        yield _notes([f"The runs train models of different {', '.join(unlike)}: losses may not compare."])


def _differ(runs: Sequence[Run], key: str) -> bool:
    return len({str(run.model[key]) for run in runs if key in run.model}) > 1


def _run(run: Run, drawings: Sequence[Drawing], several: bool) -> list[str]:
    parts = [f'<p class="muted">{escape(str(run.directory))}</p>\n'] if several else []
    if run.notes:
        parts.append(_notes(run.notes))
    return [*parts, _figures(drawings), _settings(run)]


def _notes(notes: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>\n'


def _figures(drawings: Sequence[Drawing]) -> str:
    return f'<div class="figures">\n{"".join(map(_figure, drawings))}</div>\n' if drawings else ""


def _figure(drawing: Drawing) -> str:
    width, height = drawing.size
    return (
        f"<figure>\n<h3>{escape(drawing.title)}</h3>\n"
        f'<img src="{drawing.data_url()}" width="{width}" height="{height}" alt="{escape(drawing.alt)}">\n'
        f"<figcaption>{escape(drawing.caption)}</figcaption>\n</figure>\n"
    )


def _settings(run: Run) -> str:
    tables: list[tuple[str, Mapping[str, Any]]] = [
        ("Sparsity config", run.config.to_dict() if run.config else {}),
        ("Model config", {key: value for key, value in run.model.items() if not isinstance(value, dict | list)}),
    ]
    whose = f" of {run.label}"
    return "".join(
        f'<details>\n<summary>{escape(name + whose)}</summary>\n<table>\n<thead><tr><th scope="col">field</th>'
        f'<th scope="col">value</th></tr></thead>\n<tbody>'
        + "".join(
            f'<tr><th scope="row">{escape(str(k))}</th><td>{escape(str(v))}</td></tr>\n' for k, v in fields.items()
        )
        + "</tbody>\n</table>\n</details>\n"
        for name, fields in tables
        if fields
    )

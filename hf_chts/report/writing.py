"""The report of one or several runs, written as one HTML file and the figures beside it."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_chts.files.atomic import write_whole
from hf_chts.report.drawing import Drawing
from hf_chts.report.drawings import comparison_of, drawings_of
from hf_chts.report.run import Run, labels, read_run
from hf_chts.report.summary import summary_rows


def write_report(run_dirs: Sequence[str | Path], output: str | Path | None = None, layers: str = "*") -> Path:
    """Write what is known of runs, finished or not, into one HTML file, and its figures as PNG files beside it.

    The file needs no network and no other file. The PNG files are in a directory called after it: `report_figures` of
    `report.html`.

    Args:
        run_dirs: output_dirs of runs, in the order to show them; differences are from the first.
        output: the HTML file; None: `report.html` in the run's directory, or in the current one for several runs.
        layers: a pattern (`*`, `?`) for the names of the layers to show by themselves.

    Returns:
        The path of the HTML file.

    Raises:
        FileNotFoundError: a run_dir is not a directory.
        ValueError: a run_dir holds no run or is given twice, no layer has a name like `layers`, or `output` is a
            directory. Nothing has been written then.
    """
    directories = [Path(directory) for directory in run_dirs]
    if not directories:
        raise ValueError("there is no run to report on: give the output_dir of at least one")
    names = labels(directories)
    runs = [read_run(directory, name, layers) for directory, name in zip(directories, names, strict=True)]
    output = Path(output) if output is not None else (directories[0] if len(runs) == 1 else Path()) / "report.html"
    if output.is_dir():
        raise ValueError(f"{output} is a directory: name the HTML file to write")
    comparison = comparison_of(runs) if len(runs) > 1 else []
    drawings = [drawings_of(run) for run in runs]
    files = {drawing.name: drawing for drawing in comparison}
    for run, own in zip(runs, drawings, strict=True):
        prefix = re.sub(r"[^\w.-]+", "_", run.label) + "-" if len(runs) > 1 else ""
        files |= {f"{prefix}{drawing.name}": drawing for drawing in own}
    figures = output.with_name(f"{output.stem}_figures")
    figures.mkdir(parents=True, exist_ok=True)
    for name, drawing in files.items():
        write_whole(figures / f"{name}.png", drawing.encoded("png"))
    write_whole(output, _page(runs, comparison, drawings).encode())
    return output


def _page(runs: Sequence[Run], comparison: Sequence[Drawing], drawings: Sequence[Sequence[Drawing]]) -> str:
    several = len(runs) > 1
    environment = Environment(
        loader=PackageLoader("hf_chts.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("report.html.jinja").render(
        title=f"{len(runs)} runs side by side" if several else f"Report of {runs[0].label}",
        several=several,
        runs=runs,
        rows=summary_rows(runs),
        notes=_shared_notes(runs),
        comparison=comparison,
        drawings=drawings,
        plain_fields=_plain_fields,
        zip=zip,
        written=datetime.now().isoformat(timespec="minutes"),
    )


def _shared_notes(runs: Sequence[Run]) -> list[str]:
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers")
    different = [key for key in sizes if len({str(run.model[key]) for run in runs if key in run.model}) > 1]
    return [f"The runs train models of different {', '.join(different)}: losses may not compare."] if different else []


def _plain_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if not isinstance(value, dict | list)}

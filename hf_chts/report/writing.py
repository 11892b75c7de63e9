"""The report of one or several runs, written."""

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from hf_chts.files.atomic import write_whole
from hf_chts.report.comparison_drawings import comparison_drawings
from hf_chts.report.drawing import Drawing
from hf_chts.report.layer_drawings import layer_drawings
from hf_chts.report.network_drawings import network_drawings
from hf_chts.report.page import page
from hf_chts.report.run import Run, labels, read_run
from hf_chts.report.summary import summary_rows
from hf_chts.report.topology_drawings import topology_drawings
from hf_chts.report.training_drawings import training_drawings


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
        FileNotFoundError: a run_dir is no directory.
        ValueError: a run_dir holds no run, or is there twice, or no layer has a name like `layers`. Nothing has been
            written then.
    """
    directories = [Path(directory) for directory in run_dirs]
    if not directories:
        raise ValueError("there is no run to report on: give the output_dir of at least one")
    runs = [
        read_run(directory, label, layers) for directory, label in zip(directories, labels(directories), strict=True)
    ]
    output = Path(output) if output is not None else (directories[0] if len(runs) == 1 else Path()) / "report.html"
    if output.is_dir():
        raise ValueError(f"{output} is a directory: name the HTML file to write")
    compared = list(comparison_drawings(runs)) if len(runs) > 1 else []
    own = [_drawings(run) for run in runs]
    text = page(runs, summary_rows(runs), compared, own, datetime.now())
    named = {drawing.name: drawing for drawing in compared}
    for run, drawings in zip(runs, own, strict=True):
        prefix = f"{_file_name(run.label)}-" if len(runs) > 1 else ""
        named |= {f"{prefix}{drawing.name}": drawing for drawing in drawings}
    _write_figures(output.with_name(f"{output.stem}_figures"), named)
    write_whole(output, text.encode())
    return output


def _drawings(run: Run) -> list[Drawing]:
    return [
        *training_drawings(run),
        *topology_drawings(run),
        *layer_drawings(run),
        *network_drawings(run),
    ]


def _write_figures(directory: Path, drawings: dict[str, Drawing]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, drawing in drawings.items():
        write_whole(directory / f"{name}.png", drawing.encoded("png"))


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.-]+", "_", label)

"""The table of all runs at the beginning of a report."""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_chts.report.drawing import Series
from hf_chts.report.run import Run

NONE = "–"


@dataclass(frozen=True)
class Row:
    """One line of the table: a figure of every run.

    Attributes:
        name: of the figure.
        cells: a text for each run.
        differences: for each run the difference from the first one, or an empty text.
    """

    name: str
    cells: list[str]
    differences: list[str]


def summary_rows(runs: Sequence[Run]) -> list[Row]:
    """The rows of the table."""
    return [
        _words("Method", [run.method for run in runs]),
        _words("Steps", [_steps(run) for run in runs]),
        _numbers("Sparsity", [_sparsity(run) for run in runs], ".2%", None),
        _numbers("Training loss", [_last(run, "loss") for run in runs], ".4f", "+.4f"),
        _numbers("Validation loss", [_evaluated(run, "eval_loss") for run in runs], ".4f", "+.4f"),
        _numbers("Bits per byte", [_evaluated(run, "eval_bits_per_byte") for run in runs], ".4f", "+.4f"),
        _numbers("ITOP", [_update(run, "itop") for run in runs], ".4f", "+.4f"),
        _numbers("Active neurons", [_update(run, "active_neurons") for run in runs], ".2%", None),
        _numbers("Updates", [float(len(run.updates())) for run in runs], ".0f", None),
        _numbers("Seconds on topology", [topology_seconds(run) for run in runs], ".1f", "+.1f"),
        _numbers("Share of the time", [topology_share(run) for run in runs], ".1%", None),
        _numbers("Seconds of training", [training_seconds(run) for run in runs], ".0f", "+.0f"),
    ]


def topology_seconds(run: Run) -> float | None:
    """Seconds that all updates so far took together; None if they are not known."""
    series = Series.of(run.updates(), "topology_seconds")
    return sum(series.values) if series else (0.0 if run.is_dense else None)


def topology_share(run: Run) -> float | None:
    """Their share of the recorded time; None without records: what the Trainer logs is of its last start only."""
    seconds, topology = (Series.of(run.seconds, key) for key in ("seconds", "topology_seconds"))
    return sum(topology.values) / sum(seconds.values) if seconds and topology and sum(seconds.values) else None


def training_seconds(run: Run) -> float | None:
    """Over all starts of the run, if recorded; else since the last start, as the Trainer logged it."""
    recorded = Series.of(run.seconds, "seconds")
    return (sum(recorded.values) if recorded else 0.0) or _last(run, "train_runtime")


def _steps(run: Run) -> str:
    return f"{run.step} of {run.max_steps}" if run.max_steps > run.step else f"{run.step}"


def _sparsity(run: Run) -> float | None:
    if run.is_dense:
        return 0.0
    last = _update(run, "sparsity")
    if last is None and run.config is not None and not run.config.evolves:
        return run.config.sparsity
    return last


def _update(run: Run, key: str) -> float | None:
    series = Series.of(run.updates(), key)
    return series.last if series else None


def _last(run: Run, key: str) -> float | None:
    series = Series.of(run.log, key)
    return series.last if series else None


def _evaluated(run: Run, key: str) -> float | None:
    logged = _last(run, key)
    if logged is not None:
        return logged
    saved = Series.of([{"step": run.step, **run.evaluation}], key)
    return saved.last if saved else None


def _words(name: str, cells: list[str]) -> Row:
    return Row(name, cells, [""] * len(cells))


def _numbers(name: str, values: list[float | None], form: str, difference: str | None) -> Row:
    first = values[0]
    differences = [
        "" if index == 0 or difference is None or first is None or value is None else _apart(value - first, difference)
        for index, value in enumerate(values)
    ]
    cells = [NONE if value is None else f"{value:{form}}" for value in values]
    return Row(name, cells, differences)


def _apart(difference: float, form: str) -> str:
    text = f"{difference:{form}}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")

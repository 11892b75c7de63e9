"""The table of all runs at the beginning of a report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_chts.baseline import ENTRY, baseline_of
from hf_chts.report.drawing import Series
from hf_chts.report.run import Run

UNKNOWN = "–"


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

    def words(name: str, text: Callable[[Run], str]) -> Row:
        return Row(name, [text(run) for run in runs], [""] * len(runs))

    def numbers(name: str, value: Callable[[Run], float | None], form: str, *, compared: bool = False) -> Row:
        values = [value(run) for run in runs]
        first = values[0]
        differences = [
            _difference(number - first, form) if compared and first is not None and number is not None else ""
            for number in values
        ]
        cells = [UNKNOWN if number is None else f"{number:{form}}" for number in values]
        return Row(name, cells, ["", *differences[1:]])

    # rows that only some runs have, and only where one of those shown has it
    sizes = [
        numbers("Parameters without missing links", lambda run: _size(run, "parameters"), ",.0f"),
        numbers("Links", lambda run: _size(run, "links"), ",.0f"),
        numbers("Links on the mean over the run", lambda run: _size(run, "average_links"), ",.0f"),
    ]
    baseline = words("Dense baseline", lambda run: baseline_of(run.model) or UNKNOWN)
    return [
        words("Method", lambda run: run.method),
        *(row for row in (baseline, *sizes) if any(cell != UNKNOWN for cell in row.cells)),
        words("Steps", lambda run: f"{run.step} of {run.max_steps}" if run.max_steps > run.step else f"{run.step}"),
        numbers("Sparsity", _sparsity, ".2%"),
        numbers("Training loss", lambda run: _last(run.log, "loss"), ".4f", compared=True),
        numbers("Validation loss", lambda run: _evaluated(run, "eval_loss"), ".4f", compared=True),
        numbers("Bits per byte", lambda run: _evaluated(run, "eval_bits_per_byte"), ".4f", compared=True),
        numbers("ITOP", lambda run: _last(run.updates(), "itop"), ".4f", compared=True),
        numbers("Active neurons", lambda run: _last(run.updates(), "active_neurons"), ".2%"),
        numbers("Updates", lambda run: len(run.updates()), ".0f"),
        numbers("Seconds on topology", _topology_seconds, ".1f", compared=True),
        numbers("Share of the time", _topology_share, ".1%"),
        numbers("Seconds of training", _training_seconds, ".0f", compared=True),
    ]


def _sparsity(run: Run) -> float | None:
    if run.is_dense:
        return 0.0
    last = _last(run.updates(), "sparsity")
    return run.config.sparsity if last is None and run.config is not None and not run.config.evolves else last


def _size(run: Run, key: str) -> float | None:
    """As it was at the end of a run; of a dense baseline, as it was made."""
    found = run.sizes.get(key, _last(run.log, key))
    if found is None and run.is_dense and baseline_of(run.model):
        return run.model[ENTRY].get(key)
    return found


def _topology_seconds(run: Run) -> float | None:
    """Seconds that all updates so far took together."""
    total = _total(run.updates(), "topology_seconds")
    return 0.0 if total is None and run.is_dense else total


def _topology_share(run: Run) -> float | None:
    """Their share of the recorded time; None without records: what the Trainer logs is of its last start only."""
    topology, whole = _total(run.seconds, "topology_seconds"), _total(run.seconds, "seconds")
    return topology / whole if topology is not None and whole else None


def _training_seconds(run: Run) -> float | None:
    """Over all starts of the run, if recorded; else since the last start, as the Trainer logged it."""
    return _total(run.seconds, "seconds") or _last(run.log, "train_runtime")


def _evaluated(run: Run, key: str) -> float | None:
    """The last logged figure of an evaluation, else the saved one."""
    logged = _last(run.log, key)
    return logged if logged is not None else _last([{"step": run.step, **run.evaluation}], key)


def _last(entries: Sequence[Mapping[str, Any]], key: str) -> float | None:
    series = Series.of(entries, key)
    return series.last if series else None


def _total(entries: Sequence[Mapping[str, Any]], key: str) -> float | None:
    series = Series.of(entries, key)
    return sum(series.values) if series else None


def _difference(number: float, form: str) -> str:
    text = f"{number:+{form}}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")  # what rounds to 0 has no sign

"""What a report knows about a run: its logs, the records of its topology, and what is missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers.trainer_utils import sort_checkpoints

from hf_chts.checkpoint.run_folder import all_sealed, sealed
from hf_chts.config import CONFIG_NAME, SparsityConfig
from hf_chts.evolution.update_figures import LayerUpdate, overall_figures
from hf_chts.files.reading import read_json
from hf_chts.names import shortest_endings
from hf_chts.records.run_record import FORMAT, LAYERS_NAME, RECORD_DIR, SECONDS_NAME, SIZES_NAME, read_lines
from hf_chts.records.snapshots import LayerSnapshot, load_snapshot, snapshot_paths
from hf_chts.report.circuit import Circuit, read_circuit
from hf_chts.schedule_plan import SchedulePlan

TRAINER_STATE = "trainer_state.json"
_OF_UPDATES = ("links_removed", "links_regrown", "itop", "active_neurons")


@dataclass(frozen=True)
class LayerRecords:
    """What was recorded of each layer.

    Attributes:
        shapes: (out, in) by layer name.
        updates: step → layer name → its counts, in order of the steps.
        softness: step → layer name → δ of its next removal; only where layers differ.
    """

    shapes: dict[str, tuple[int, int]]
    updates: dict[int, dict[str, LayerUpdate]]
    softness: dict[int, dict[str, float]]


@dataclass(frozen=True)
class Run:
    """One run, as far as its directory tells.

    Attributes:
        directory: the output_dir.
        label: what the report calls the run.
        config: None if none was saved, as by dense runs, or if it cannot be read.
        unread: there is a config, and it cannot be read.
        log: `log_history` of the Trainer.
        step: the last known step; 0 if unknown.
        max_steps: the length of the run; 0 if unknown.
        evaluation: eval_results.json; empty if there is none.
        model: config.json of its model; empty if there is none.
        records: of all layers; None if there are none.
        sizes: links and parameters at the end of the run; empty before it.
        shown: the names of the layers to show by themselves.
        seconds: the lines of seconds.jsonl.
        snapshots: step → layer name → its snapshot.
        circuit: of a prompt, if one was traced.
        notes: a sentence for each thing that is missing or could not be read.
    """

    directory: Path
    label: str
    config: SparsityConfig | None
    log: list[dict[str, Any]]
    step: int
    max_steps: int
    evaluation: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    records: LayerRecords | None = None
    shown: tuple[str, ...] = ()
    seconds: list[dict[str, Any]] = field(default_factory=list)
    snapshots: dict[int, dict[str, LayerSnapshot]] = field(default_factory=dict)
    circuit: Circuit | None = None
    notes: tuple[str, ...] = ()
    unread: bool = False
    sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return self.config.method if self.config else "dense" if self.is_dense else "not known"

    @property
    def is_dense(self) -> bool:
        if self.config:
            return self.config.is_dense
        return not (self.unread or self.records or any(map(is_update, self.log)))

    def plan(self) -> SchedulePlan | None:
        """The schedules; None if the config or the length of the run is unknown, or they do not fit each other."""
        if self.config is None or not self.max_steps:
            return None
        try:
            return self.config.plan(self.max_steps)
        except ValueError:  # checked when the run began; the config may have been edited since
            return None

    def updates(self) -> list[dict[str, Any]]:
        """The figures of each update in order of `step`: as logged, else (after the last log) as recorded."""
        figures: dict[int, dict[str, Any]] = {}
        if self.records:
            for step, layers in self.records.updates.items():
                figures[step] = overall_figures(layers, self.records.shapes)
            for line in self.seconds:
                if line["step"] in figures and "topology_seconds" in line:
                    figures[line["step"]]["topology_seconds"] = line["topology_seconds"]
        for entry in self.log:
            if is_update(entry):
                figures[entry["step"]] = {**figures.get(entry["step"], {}), **entry}
        return [{**figures[step], "step": step} for step in sorted(figures)]


def read_run(directory: str | Path, label: str | None = None, layers: str = "*") -> Run:
    """Read the directory of a run, finished or not.

    Args:
        directory: a run's output_dir, or one that holds only checkpoints, or one checkpoint.
        label: what to call it; None: the name of the directory.
        layers: a pattern (`*`, `?`) for the names of the layers to show by themselves.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: the directory holds no run, or no layer has a name like `layers`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory: give the output_dir of a run")
    notes: list[str] = []
    passed_over = {*all_sealed(directory)} - {*sealed(directory)}  # of another run in the same directory
    checkpoints = [Path(path) for path in reversed(sort_checkpoints(str(directory))) if Path(path) not in passed_over]
    places = [directory, *checkpoints]
    records, seconds, snapshots = _read_records(directory / RECORD_DIR, notes)
    state = _read_state(places, notes)
    if state is None and records is None:
        raise ValueError(
            f"{directory} holds no run: there is no {TRAINER_STATE}, no checkpoint and no {RECORD_DIR}/{LAYERS_NAME}. "
            "Give the output_dir that the run was trained with"
        )
    if state is None:
        notes.append("There is no checkpoint yet, so losses are not known: the Trainer's log is only in memory.")
    found = state or {}
    log = [entry for entry in found.get("log_history", []) if isinstance(entry, dict) and "step" in entry]
    config = _read_config(places, notes)
    unread = config is None and any((place / CONFIG_NAME).is_file() for place in (*places, directory / "export"))
    dense = config.is_dense if config else not (unread or any(map(is_update, log)))
    if dense and records is not None and state is not None:
        notes.append(f"{RECORD_DIR}/ was left out: it is from an earlier, sparse run in the same directory.")
        records, seconds, snapshots = None, [], {}
    reached = [found.get("global_step", 0), *(line["step"] for line in seconds)]
    run = Run(
        directory=directory,
        label=label or directory.resolve().name,
        config=config,
        unread=unread,
        log=log,
        step=max(reached),
        max_steps=found.get("max_steps", 0),
        evaluation=_first([directory], "eval_results.json", notes),
        model=_first([*places, directory / "export"], "config.json", notes),
        records=records,
        sizes=_json(directory / RECORD_DIR / SIZES_NAME, notes) if records else {},
        shown=_shown(records, layers, directory) if records else (),
        seconds=seconds,
        snapshots={
            step: {name: one for name, one in snapshot.items() if fnmatchcase(name, layers)}
            for step, snapshot in snapshots.items()
        },
        circuit=read_circuit(directory / RECORD_DIR),
    )
    return Run(**{**vars(run), "notes": (*notes, *_gaps(run))})


def labels(directories: Sequence[Path]) -> list[str]:
    """Names for runs: the shortest endings of their paths that tell them apart.

    Raises:
        ValueError: a directory was given twice.
    """
    paths = [directory.resolve() for directory in directories]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} was given twice: give every run once")
    return shortest_endings([path.as_posix() for path in paths], "/")


def _read_state(places: Sequence[Path], notes: list[str]) -> dict[str, Any] | None:
    """The trainer state with the longest log: in a resumed run, checkpoints may be newer than the one beside them."""
    states = [state for place in places if (state := _json(place / TRAINER_STATE, notes))]
    states = [state for state in states if isinstance(state.get("log_history"), list)]
    return max(states, key=lambda state: (state.get("global_step", 0), len(state["log_history"])), default=None)


def _read_config(places: Sequence[Path], notes: list[str]) -> SparsityConfig | None:
    for place in (*places, places[0] / "export"):
        if (place / CONFIG_NAME).is_file():
            try:
                return SparsityConfig.load(place)
            except (ValueError, TypeError, OSError) as error:
                known = _known_part(place / CONFIG_NAME)
                if known is not None:
                    notes.append(f"{place / CONFIG_NAME} is from another version and was read in part: {error}.")
                    return known
                notes.append(f"{place / CONFIG_NAME} could not be read: {error}.")
    return None


def _known_part(path: Path) -> SparsityConfig | None:
    """The config made of the fields that this version knows; None if they do not make one."""
    values = _json(path, [])
    names = {one.name for one in fields(SparsityConfig)} - {"version", "parts"}  # no code that the file names
    try:
        return SparsityConfig(**{name: value for name, value in values.items() if name in names}) if values else None
    except (ValueError, TypeError):
        return None


def _first(places: Sequence[Path], name: str, notes: list[str]) -> dict[str, Any]:
    return next((found for place in places if (found := _json(place / name, notes))), {})


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file, or, with a note, if it cannot be read."""
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except (ValueError, OSError) as error:
        notes.append(f"{path} could not be read: {error}.")
        return {}


def _read_records(
    directory: Path, notes: list[str]
) -> tuple[LayerRecords | None, list[dict[str, Any]], dict[int, dict[str, LayerSnapshot]]]:
    header, *lines = read_lines(directory / LAYERS_NAME) or [{}]
    if header.get("format") != FORMAT:
        if header:
            notes.append(f"{directory / LAYERS_NAME} was left out: its format is not {FORMAT!r}.")
        return None, [], {}
    names = list(header["layers"])
    records = LayerRecords(
        shapes={name: (shape[0], shape[1]) for name, shape in header["layers"].items()},
        updates={line["step"]: _counts(line, names) for line in lines},
        softness={
            line["step"]: dict(zip(names, line["softness"], strict=True))
            for line in lines
            if _of_layers(line.get("softness"), names)
        },
    )
    missing = [count for count in LayerUpdate.__dataclass_fields__ if not all(count in line for line in lines)]
    if missing:
        notes.append(
            f"{directory / LAYERS_NAME} is from another version, which did not write {', '.join(missing)}: figures "
            "made of them are missing."
        )
    snapshots = {}
    for step, path in snapshot_paths(directory).items():
        try:
            snapshots[step] = load_snapshot(path)
        except ValueError as error:
            notes.append(f"{error}.")
    times = read_lines(directory / SECONDS_NAME)
    return records, [line for line in times if isinstance(line.get("step"), int)], snapshots


def _counts(line: dict[str, Any], names: Sequence[str]) -> dict[str, LayerUpdate]:
    """The counts of each layer in a line of the records: None if missing; those unknown to this version are ignored."""
    known = {count: line[count] for count in LayerUpdate.__dataclass_fields__ if _of_layers(line.get(count), names)}
    return {name: LayerUpdate(**{count: row[i] for count, row in known.items()}) for i, name in enumerate(names)}


def _of_layers(row: Any, names: Sequence[str]) -> bool:
    return isinstance(row, list) and len(row) == len(names)


def is_update(entry: Mapping[str, Any]) -> bool:
    """Whether a log is that of a topology update, written by this version or another."""
    return not entry.keys().isdisjoint(_OF_UPDATES)


def _shown(records: LayerRecords, pattern: str, directory: Path) -> tuple[str, ...]:
    names = tuple(name for name in records.shapes if fnmatchcase(name, pattern))
    if not names:
        raise ValueError(
            f"no layer of {directory} has a name like {pattern!r}: they are called "
            f"{next(iter(records.shapes))} and so on"
        )
    return names


def _gaps(run: Run) -> list[str]:
    """What a reader may miss, and why it is not there."""
    gaps = []
    if run.max_steps and run.step < run.max_steps:
        gaps.append(f"The run is at step {run.step} of {run.max_steps}: it is still going on, or was stopped.")
    if run.is_dense:
        return [*gaps, "The run is dense: it has no topology to show."]
    if run.records is None:
        gaps.append(
            f"There is no {RECORD_DIR}/{LAYERS_NAME}: the run was trained by a version that did not write it, or only "
            "its checkpoints were copied. The figures of single layers are missing."
        )
    else:
        logged = {entry["step"] for entry in run.log if is_update(entry)}
        missing = sorted(logged - run.records.updates.keys())
        every_step = run.config is not None and run.config.trains_missing  # records have only some of these
        if missing and not every_step:
            gaps.append(
                f"{len(missing)} updates, from step {missing[0]} to {missing[-1]}, are not in {RECORD_DIR}/"
                f"{LAYERS_NAME}: the run was resumed from another directory, or could not write there."
            )
    if not any("eval_loss" in entry for entry in run.log) and run.log:
        gaps.append("No evaluation was logged, so validation loss and bits per byte are not known.")
    return gaps

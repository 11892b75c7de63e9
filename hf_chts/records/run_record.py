"""The record of a run's topology, in the folder `topology` of its output_dir.

`layers.jsonl`: a header with shapes and the run's id, then one line per update with the counts of each layer
(update_figures.py).
`plans.jsonl`: one line where training starts, and one wherever it is resumed with another plan: the step from which
the plan holds, the length of the run, its last update, and the lower bound on sparsity (0: the schedule alone decides).
`seconds.jsonl`: one line per update and one at the end, with the seconds since the last line, and those of the update.
`sizes.json`: of a run that has ended, its last step, and the links and parameters then and on the mean over its steps.
`snapshot-STEP.safetensors`: some layers before the first, after the middle and after the last update (snapshots.py).

A run that is resumed from step s drops what was written after s and continues, so that its records end up the same as
those of an uninterrupted run, byte for byte, except for the seconds. Training never reads the records, and continues
if they cannot be written.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_chts.evolution.update_figures import LayerUpdate
from hf_chts.files.atomic import write_whole
from hf_chts.records.snapshots import save_snapshot, snapshot_layers, snapshot_path, snapshot_paths, snapshot_steps
from hf_chts.schedule_plan import SchedulePlan

RECORD_DIR = "topology"
LAYERS_NAME, PLANS_NAME, SECONDS_NAME, SIZES_NAME = "layers.jsonl", "plans.jsonl", "seconds.jsonl", "sizes.json"
FORMAT = "hf_chts topology records, 1"

_log = logging.getLogger(__name__)


class RunRecord:
    """Writes the record of one run, on rank 0.

    Args:
        output_dir: of the run.
        shapes: (out, in) by layer name.
        plan: when the topology is updated.
        run: the id of the run (checkpoint/run_identity.py); None if it is not known.
    """

    def __init__(
        self, output_dir: str | Path, shapes: Mapping[str, tuple[int, int]], plan: SchedulePlan, run: str | None = None
    ) -> None:
        self.directory = Path(output_dir) / RECORD_DIR
        self.pictured = snapshot_layers(list(shapes))
        self.steps = snapshot_steps(plan)
        self.header: dict[str, Any] = {
            "format": FORMAT,
            "layers": {name: list(shape) for name, shape in shapes.items()},
            **({"run": run} if run else {}),
        }
        self.plan = {
            "max_steps": plan.max_steps,
            "last_update": plan.last_update,
            "sparsity_floor": round(plan.floor, 9),
        }
        self._mark = (0, 0.0)  # the step and the time of the last line of seconds
        self._writes = True

    def begin(self, step: int, masks: Mapping[str, Tensor]) -> None:
        """Training starts, or is resumed, after `step` finished steps; masks are bool (out, in) by layer name."""
        self._try(self._begin, step, masks)
        self._mark = (step, time.perf_counter())

    def update(
        self,
        step: int,
        layers: Mapping[str, LayerUpdate],
        masks: Mapping[str, Tensor],
        seconds: float,
        softness: Mapping[str, float],
    ) -> None:
        """Record the update after `step`.

        Args:
            layers: counts by layer name.
            masks: bool (out, in) by layer name, after the update.
            seconds: that the update took.
            softness: δ of each layer's next removal; empty where it does not adapt.
        """
        self._try(self._update, step, layers, masks, softness)
        self._try(self._add_seconds, step, seconds)

    def end(self, step: int, sizes: Mapping[str, float]) -> None:
        """Training ends after `step` finished steps, with these links and parameters."""
        self._try(write_whole, self.directory / SIZES_NAME, _line({"step": step, **sizes}))
        if step > self._mark[0]:
            self._try(self._add_seconds, step, 0.0)

    def _try(self, write: Any, *args: Any) -> None:
        if not self._writes:
            return
        try:
            write(*args)
        except OSError as error:
            self._writes = False
            _log.warning(
                "The topology is no longer recorded in %s (%s). Training goes on; the report will lack what follows",
                self.directory,
                error,
            )

    def _begin(self, step: int, masks: Mapping[str, Tensor]) -> None:
        (self.directory / SIZES_NAME).unlink(missing_ok=True)
        lines = read_lines(self.directory / LAYERS_NAME)
        same_run = step > 0 and bool(lines) and self._is_mine(lines[0])
        kept = [line for line in lines[1:] if line["step"] <= step] if same_run else []
        _rewrite(self.directory / LAYERS_NAME, [self.header, *kept])
        seconds = read_lines(self.directory / SECONDS_NAME) if same_run else []
        _rewrite(self.directory / SECONDS_NAME, [line for line in seconds if line["step"] <= step])
        plans = read_lines(self.directory / PLANS_NAME) if same_run else []
        plans = [line for line in plans if line["step"] <= step]
        last = plans[-1] if plans else {}
        # still the same plan if the schedule has caught up with its earlier lower bound and so has none any more
        same_plan = last.get("max_steps") == self.plan["max_steps"]
        if not (same_plan and self.plan["sparsity_floor"] in (0, last.get("sparsity_floor"))):
            plans.append({"step": step, **self.plan})
        _rewrite(self.directory / PLANS_NAME, plans)
        for found, path in snapshot_paths(self.directory).items():
            if not same_run or found > step:
                path.unlink()
        if step == 0:
            self._snapshot(step, masks)

    def _is_mine(self, header: Mapping[str, Any]) -> bool:
        """Whether records with this header belong to this run; those of early versions have no ids."""
        ids = {header.get("run"), self.header.get("run")} - {None}
        return len(ids) < 2 and {**self.header, "run": None} == {**header, "run": None}

    def _update(
        self, step: int, layers: Mapping[str, LayerUpdate], masks: Mapping[str, Tensor], softness: Mapping[str, float]
    ) -> None:
        rows = [asdict(layers[name]) for name in self.header["layers"]]
        line: dict[str, Any] = {"step": step} | {count: [row[count] for row in rows] for count in rows[0]}
        if softness:
            line["softness"] = [round(softness[name], 6) for name in self.header["layers"]]
        _append(self.directory / LAYERS_NAME, line)
        self._snapshot(step, masks)

    def _snapshot(self, step: int, masks: Mapping[str, Tensor]) -> None:
        if step in self.steps:
            save_snapshot(snapshot_path(self.directory, step), {name: masks[name] for name in self.pictured})

    def _add_seconds(self, step: int, topology_seconds: float) -> None:
        now = time.perf_counter()
        before, then = self._mark
        line = {"step": step, "steps": step - before, "seconds": round(now - then, 4)}
        self._mark = (step, now)
        _append(self.directory / SECONDS_NAME, line | {"topology_seconds": round(topology_seconds, 4)})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a record up to the first incomplete one, where its run was killed; [] without a file."""
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or (lines and not isinstance(line.get("step"), int)):
            break
        lines.append(line)
    return lines


def _rewrite(path: Path, lines: list[dict[str, Any]]) -> None:
    write_whole(path, "".join(_line(line) for line in lines))


def _append(path: Path, line: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(_line(line))


def _line(line: dict[str, Any]) -> str:
    return json.dumps(line, separators=(",", ":")) + "\n"

"""What the numbers and curves of a task are called on the page of a study, and how they are written."""

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_chts.config_checks import unknown
from hf_chts.studies.statistics import Estimate
from hf_chts.studies.tasks import TASKS


@dataclass(frozen=True)
class Figure:
    """A number of `Outcome.figures`.

    Attributes:
        title: head of its column.
        unit: as written behind the title; "" for none.
        better: whether more or less of it is better; "" for what only describes a run, such as its number of links.
        digits: after the point.
        papers: whether the `paper` of a study's rows is of this kind. Of none: of the task's first figure.
    """

    title: str
    unit: str = ""
    better: Literal["higher", "lower", ""] = ""
    digits: int = 2
    papers: bool = False

    @property
    def head(self) -> str:
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def text(self, value: float) -> str:
        """A value, such as "90.61", "−0.40" or "61,465"."""
        return f"{value:,.{self.digits}f}".replace("-", "−")

    def estimate(self, found: Estimate | None) -> str:
        """A mean and its error, such as "90.61 ± 0.05"; without one where it has none. "" for None."""
        if found is None:
            return ""
        # what is the same in every run, such as a number of links, needs no error
        if found.error is None or (not self.better and round(found.error, self.digits) == 0):
            return self.text(found.mean)
        return f"{self.text(found.mean)} ± {self.text(found.error)}"

    def difference(self, found: Estimate | None) -> str:
        """A difference and its error, such as "+0.64 ± 0.05 *".

        One star: more than two standard errors from 0. Two: chance alone does that in fewer than 5 cases of 100.
        """
        if found is None:
            return ""
        rounded = round(found.mean, self.digits) + 0.0  # −0.0 + 0.0 is 0.0: the sign of a zero is noise
        mean = f"{'+' if rounded > 0 else ''}{self.text(rounded)}"
        error = "" if found.error is None else f" ± {self.text(found.error)}"
        stars = " **" if found.significant else " *" if found.outside else ""
        return f"{mean}{error}{stars}"


# those that every task has of a sparse model
TOPOLOGY: Mapping[str, Figure] = {
    "itop": Figure("ITOP", digits=3),
    "active_neurons": Figure("active neurons", digits=3),
    "links": Figure("links", digits=0),
}
TOPOLOGY_CURVES: Mapping[str, str] = {"itop": "ITOP", "active_neurons": "active neurons"}


def figures_of(task: str) -> Mapping[str, Figure]:
    """The figures of a task in the order of their columns, the main one first: its module's `FIGURES`.

    Raises:
        ValueError: there is no such task, or it does not say.
    """
    return _constant(task, "FIGURES")


def curves_of(task: str) -> Mapping[str, str]:
    """The curves of a task that are drawn, the main one first, with the titles of their axes: its module's `CURVES`.

    Raises:
        ValueError: there is no such task, or it does not say.
    """
    return _constant(task, "CURVES")


def best_of(values: Sequence[float], sparsity: Sequence[float], better: Literal["higher", "lower"]) -> int | None:
    """The number of the best evaluation among those with the sparsity of the last one.

    While sparsity still rises a model has more links, and its figure is not that of the model that was asked for.

    Args:
        values: of the evaluations, in their order; those that are not finite do not count.
        sparsity: of the model at each of them.

    Returns:
        Counted from 0, the first of equal ones; None if there is none.
    """
    counting = [
        number
        for number, value in enumerate(values)
        if math.isfinite(value) and abs(sparsity[number] - sparsity[-1]) < 1e-6
    ]
    return (max if better == "higher" else min)(counting, key=values.__getitem__, default=None)


def papers_figure(figures: Mapping[str, Figure]) -> str:
    """The name of the figure that a paper's is compared with."""
    return next((name for name, figure in figures.items() if figure.papers), next(iter(figures)))


def _constant(task: str, name: str) -> Any:
    if task not in TASKS:
        raise ValueError(unknown("task", task, TASKS))
    found = getattr(importlib.import_module(TASKS[task]), name, None)
    if not found:
        raise ValueError(f"{TASKS[task]} has no {name}, which a study's page needs: see hf_chts/studies/figures.py")
    return found

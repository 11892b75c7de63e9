"""The figures of a report. A new one is a function in a module beside this one, and a line in one of the two lists.

Each function is called under `look()`, and returns None where the runs have nothing to show in its figure.
"""

from collections.abc import Callable, Sequence

from hf_chts.plotting import look
from hf_chts.report.circuit_drawings import circuit
from hf_chts.report.comparison_drawings import compared_bits_per_byte, compared_loss, compared_topology
from hf_chts.report.drawing import Drawing
from hf_chts.report.layer_drawings import layer_active_neurons, layer_itop, layer_overlap
from hf_chts.report.network_drawings import adjacency, degrees
from hf_chts.report.run import Run
from hf_chts.report.training_drawings import exploration, links, loss, schedules, seconds

OF_A_RUN: tuple[Callable[[Run], Drawing | None], ...] = (
    loss,
    schedules,
    seconds,
    exploration,
    links,
    layer_overlap,
    layer_itop,
    layer_active_neurons,
    adjacency,
    degrees,
    circuit,
)
OF_SEVERAL_RUNS: tuple[Callable[[Sequence[Run]], Drawing | None], ...] = (
    compared_loss,
    compared_bits_per_byte,
    compared_topology,
)


def drawings_of(run: Run) -> list[Drawing]:
    """The figures of one run."""
    with look():
        return [drawing for draw in OF_A_RUN if (drawing := draw(run)) is not None]


def comparison_of(runs: Sequence[Run]) -> list[Drawing]:
    """The figures of several runs on the same axes, in which each run keeps its colour."""
    with look():
        return [drawing for draw in OF_SEVERAL_RUNS if (drawing := draw(runs)) is not None]

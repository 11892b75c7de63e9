"""The figure of a circuit: what the neurons that a prompt makes active read and write."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from hf_chts.plotting import COLOURS, WIDTH
from hf_chts.report.circuit import Circuit, words
from hf_chts.report.drawing import Drawing
from hf_chts.report.run import Run

_POSITIVE, _NEGATIVE = COLOURS[0], COLOURS[1]


def circuit(run: Run) -> Drawing | None:
    if run.circuit is None or not run.circuit.links:
        return None
    found = run.circuit
    figure = Figure(figsize=(WIDTH, 1.1 * len(found.parts) + 1.2), layout=ConstrainedLayoutEngine(h_pad=0.1))
    panel = figure.subplots()
    _draw(panel, found)
    panel.set_xlim(-0.03, 1.03)
    panel.set_xticks([])
    panel.grid(False)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    panel.set_title("residual stream in squares, neurons in circles")
    for colour, label in ((_POSITIVE, "weight above 0"), (_NEGATIVE, "below 0")):
        panel.plot([], [], color=colour, label=label)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    at = f" in the checkpoint of step {found.step}" if found.step else ""
    return Drawing(
        "circuit",
        "Circuit of a prompt",
        f"For the last token of the prompt {found.prompt!r}{at}, from the bottom upwards: the neurons of each "
        "attention and MLP that add most to the residual stream, the strongest links by which they read it (for "
        "attentions those of their values), and by which they write to it. Wider lines carry more. Left to right is "
        "the number of the channel or neuron.",
        words(found),
        figure,
    )


def _draw(panel: Axes, found: Circuit) -> None:
    """Draw each part as a row of neurons between two rows of channels, from the bottom upwards."""
    most = {
        part: max((link.effect for link in found.links if link.layer.rpartition(".")[0] == part), default=1.0)
        for part in found.parts
    }
    heights = []
    for row, (part, neurons) in enumerate(found.parts.items()):
        heights.append((2 * row + 1, part))
        for link in (one for one in found.links if one.layer.rpartition(".")[0] == part):
            stream, neuron = 2 * row + (0 if link.reads else 2), 2 * row + 1
            places = [(link.channel + 0.5) / found.channels, (link.neuron + 0.5) / neurons]
            panel.plot(
                places,
                [stream, neuron],
                color=_POSITIVE if link.weight > 0 else _NEGATIVE,
                linewidth=0.4 + 2 * link.effect / most[part],
                alpha=0.75,
                zorder=1,
            )
            panel.plot(places[0], stream, "s", color="#4d4d4d", markersize=3, zorder=2)
            panel.plot(places[1], neuron, "o", color="#4d4d4d", markersize=4.5, zorder=2)
    labels = [".".join(part.split(".")[-2:]) for _, part in heights]
    panel.set_yticks([height for height, _ in heights], labels)

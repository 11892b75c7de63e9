"""The figure of a run in its model card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_chts.files.atomic import write_whole
from hf_chts.plotting import as_shares, encoded, legend_above, look, step_panels
from hf_chts.report.drawing import Series, curve

# y axis → log key → label
_PANELS = {
    "nats per token": {"loss": "training loss", "eval_loss": "validation loss"},
    "sparsity": {"sparsity": "sparsity"},
    "share": {"itop": "ITOP", "overlap": "overlap", "active_neurons": "active neurons"},
}


def training_figure(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Write loss, sparsity and exploration over the optimizer steps as a PNG.

    Args:
        log_history: `trainer.state.log_history`; curves that it does not hold are left out.
        path: the file; its directory is made where it is missing.

    Returns:
        `path`.
    """
    path = Path(path)
    with look():
        figure, axes = step_panels(len(_PANELS), 2.1)
        number = 0
        for panel, (title, curves) in zip(axes, _PANELS.items(), strict=True):
            panel.set_ylabel(title)
            for key, label in curves.items():
                curve(panel, Series.of(log_history, key), number, label=label, marked=key != "loss")
                number += 1
            if not panel.get_lines():
                panel.text(0.5, 0.5, "nothing logged", ha="center", va="center", transform=panel.transAxes)
            elif title != "nats per token":
                as_shares(panel)
            legend_above(panel, columns=len(curves))
        write_whole(path, encoded(figure, "png"))
    return path

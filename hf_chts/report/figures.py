"""Figures of a run, from the log history that the Trainer keeps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # runs have no display
import matplotlib.pyplot as plt


def training_figure(log_history: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Loss, sparsity and exploration over the optimizer steps, as a PNG.

    Args:
        log_history: `trainer.state.log_history`; curves that it does not hold are left out.

    Returns:
        `path`, whose folder is made where it is missing.
    """
    figure, (loss, sparsity, exploration) = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    _curve(loss, log_history, "loss", "training", color="C0")
    _curve(loss, log_history, "eval_loss", "validation", color="C1", marker="o")
    loss.set_ylabel("loss (nats per token)")
    _curve(sparsity, log_history, "sparsity", "sparsity", color="C2", marker=".")
    sparsity.set_ylabel("sparsity")
    sparsity.set_ylim(0, 1)
    _curve(exploration, log_history, "itop", "ITOP: links ever active", color="C3", marker=".")
    _curve(exploration, log_history, "overlap", "overlap: regrown just after removal", color="C4", marker=".")
    _curve(exploration, log_history, "active_neurons", "active neurons", color="C5", marker=".")
    exploration.set_ylabel("share")
    exploration.set_ylim(0, 1.05)
    exploration.set_xlabel("optimizer step")
    for axes in (loss, sparsity, exploration):
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(frameon=False)
        else:
            axes.text(0.5, 0.5, "nothing logged", ha="center", va="center", transform=axes.transAxes)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _curve(axes: Any, history: Sequence[dict[str, Any]], key: str, label: str, **style: Any) -> None:
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)

"""The figure of a run is a picture with the curves that were logged."""

import matplotlib.image
import numpy as np

from hf_chts.report.figures import training_figure

HISTORY = [
    {"step": 1, "loss": 8.0},
    {"step": 10, "sparsity": 0.6, "itop": 0.55, "overlap": 0.1, "active_neurons": 1.0},
    {"step": 10, "loss": 5.0},
    {"step": 10, "eval_loss": 5.2},
    {"step": 20, "sparsity": 0.9, "itop": 0.6, "overlap": 0.2, "active_neurons": 0.9},
    {"step": 20, "loss": 4.0},
]


def test_a_picture_with_curves(tmp_path):
    full = matplotlib.image.imread(training_figure(HISTORY, tmp_path / "new/figure.png"))
    dense = matplotlib.image.imread(
        training_figure([{"step": 1, "loss": 8.0}, {"step": 2, "loss": 7.0}], tmp_path / "d.png")
    )
    assert full.shape == dense.shape
    assert min(full.shape[:2]) > 500
    assert np.abs(full - dense).max() > 0.5
    ink = full[..., :3].std(axis=2) > 0.1  # coloured
    thirds = np.array_split(ink, 3)
    assert all(third.sum() > 100 for third in thirds)

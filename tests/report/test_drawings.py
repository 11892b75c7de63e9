"""Figures show the numbers that they are of, in colours that can be told apart."""

import importlib
import io
import re
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from cases import case_config
from matplotlib import image as pictures

import hf_chts.report
from hf_chts import plotting
from hf_chts.evaluation import figure as evaluation_figure
from hf_chts.evolution.update_figures import LayerUpdate
from hf_chts.plotting import COLOURS, DASHES, MARKERS, step_ticks
from hf_chts.records.snapshots import LayerSnapshot
from hf_chts.report import figures, network_drawings, training_drawings
from hf_chts.report.drawing import Series
from hf_chts.report.drawings import comparison_of, drawings_of
from hf_chts.report.layer_drawings import kinds_of
from hf_chts.report.run import LayerRecords, Run

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")  # fmt: skip


STYLES = Path(hf_chts.report.__file__).parent / "templates" / "styles.css"
TEXT_ON_BACKGROUND = [("ink", "paper"), ("ink", "shade"), ("muted", "paper"), ("muted", "shade"), ("link", "paper"),
                      ("note-ink", "note")]  # fmt: skip


def drawn(run):
    return {drawing.name: drawing for drawing in drawings_of(run)}


def run_of(tmp_path, **fields):
    return Run(directory=tmp_path, label="run", **({"config": None, "log": [], "step": 24, "max_steps": 24} | fields))


def contrast(first, second):
    """WCAG 2.2: the ratio of relative luminances, each with 0.05 of stray light."""

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_and_curves_stand_out_from_their_background():
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)  # WCAG's own example of what just passes
    css = STYLES.read_text()
    colour = dict(re.findall(r"--([\w-]+): (#\w{6})", css))
    for ink, paper in TEXT_ON_BACKGROUND:
        assert contrast(colour[ink], colour[paper]) >= 4.5, (ink, paper)
    inks, papers = ({f"var(--{pair[side]})" for pair in TEXT_ON_BACKGROUND} for side in (0, 1))
    assert set(re.findall(r"(?<!-)color: ([^;]+);", css)) == inks
    assert set(re.findall(r"background: ([^;]+);", css)) == papers
    assert all(contrast(colour, "#ffffff") >= 4.5 for colour in COLOURS)
    assert len(set(map(str, DASHES))) == len(set(MARKERS)) == len(set(COLOURS))  # told apart in grey too


def test_importing_the_figures_leaves_the_choice_of_a_backend_to_the_user():
    matplotlib.use("svg")
    try:
        for module in (plotting, figures, network_drawings, training_drawings, evaluation_figure):
            importlib.reload(module)
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use("agg")


def test_a_panel_for_each_kind_of_many_layers(tmp_path):
    # 32 blocks, as LLaMA-7B; of the layer in block d, d + 8 of 100 regrown links had just been removed
    names = [f"model.layers.{depth}.{part}" for depth in range(32) for part in PARTS]
    rows = {name: LayerUpdate(100, 100, 100, int(name.split(".")[2]) + 8, 30, 160) for name in names}
    records = LayerRecords(dict.fromkeys(names, (20, 20)), {10: rows, 20: rows}, {})
    drawings = drawn(run_of(tmp_path, records=records, shown=tuple(names)))
    assert {"layer_overlap", "layer_itop", "layer_active_neurons"} <= set(drawings)
    panels = drawings["layer_overlap"].figure.axes
    assert [panel.get_title(loc="left") for panel in panels] == [part.split(".")[1] for part in PARTS]
    for panel in panels:
        (line,) = panel.get_lines()
        assert line.get_xdata().tolist() == [10, 20]
        assert line.get_ydata() == pytest.approx([0.235, 0.235])  # the mean of 0.08 to 0.39
        (band,) = panel.collections
        assert (band.get_datalim(panel.transData).y0, band.get_datalim(panel.transData).y1) == pytest.approx(
            (0.08, 0.39)
        )
    assert "q_proj 0.235 (0.080 to 0.390)" in drawings["layer_overlap"].alt
    assert "down_proj 0.400 (0.400 to 0.400)" in drawings["layer_itop"].alt  # 160 of 400
    assert "down_proj 0.750 (0.750 to 0.750)" in drawings["layer_active_neurons"].alt  # 30 of 40


def test_kinds_are_called_as_shortly_as_tells_them_apart():
    gpt2 = [f"transformer.h.{i}.{part}" for i in range(2) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    assert list(kinds_of(gpt2)) == ["c_attn", "attn.c_proj", "mlp.c_proj"]
    assert kinds_of(gpt2)["mlp.c_proj"] == ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]


def test_schedules_by_hand(tmp_path):
    config = case_config("chts", update_interval=4, drop_schedule="linear", sparsity=0.9)
    drawing = drawn(run_of(tmp_path, config=config))["schedules"]
    sparsity, drop, softness = (panel.get_lines()[0] for panel in drawing.figure.axes)
    assert set(sparsity.get_ydata()) == {0.9}
    assert drop.get_xdata().tolist() == [4, 8, 12, 16]
    assert drop.get_ydata() == pytest.approx([0.1 * (1 - step / 18) for step in (4, 8, 12, 16)])  # until 0.75 of 24
    assert softness.get_ydata() == pytest.approx([0.5, 0.5 + 0.4 / 3, 0.5 + 0.8 / 3, 0.9])
    assert "softness rises from 0.50 at step 4 to 0.90 at step 16" in drawing.alt.lower()


def test_adjacency_and_degrees(tmp_path):
    start, end = torch.zeros(8, 6, dtype=torch.bool), torch.zeros(8, 6, dtype=torch.bool)
    start[:, :3] = True
    end[0, :] = True
    snapshots = {step: {"a.q": LayerSnapshot.of(mask)} for step, mask in ((0, start), (16, end))}
    run = run_of(tmp_path, snapshots=snapshots, shown=("a.q",))
    adjacency, degrees = drawn(run).values()
    shown = [panel.get_images()[0].get_array() for panel in adjacency.figure.axes if panel.get_images()]
    assert np.asarray(shown[0]).tolist() == start.float().tolist()
    assert np.asarray(shown[1]).tolist() == end.float().tolist()
    assert "a.q has 50.0% at step 0, 12.5% at step 16 of its possible links" in adjacency.alt
    outputs = degrees.figure.axes[0].patches
    assert [patch.get_label() for patch in outputs] == ["step 0", "step 16"]
    values, edges, _ = outputs[1].get_data()
    found = {round((a + b) / 2): share for a, b, share in zip(edges, edges[1:], values, strict=False) if share}
    assert found == {0: 7 / 8, 6: 1 / 8}
    assert "a.q, output nodes: 0 to 6 links, mean 0.8" in degrees.alt
    assert "a.q, input nodes: 1 to 1 links, mean 1.0" in degrees.alt


def test_any_name_of_a_run_is_in_the_legend(tmp_path):
    names = ["_a", "$\\frac$", "b" * 90]
    log = [{"step": 1, "loss": 5.0}, {"step": 9, "loss": 3.0}]
    (drawing,) = comparison_of([replace(run_of(tmp_path, log=log), label=name) for name in names])
    assert drawing.encoded("png").startswith(b"\x89PNG")
    shown = [text.get_text().strip() for text in drawing.figure.axes[0].get_legend().get_texts()]
    assert shown == ["_a", "$\\frac$", "…" + "b" * 43]


def test_a_figure_as_files(tmp_path):
    (drawing,) = drawings_of(run_of(tmp_path, log=[{"step": 1, "loss": 5.0}, {"step": 9, "loss": 3.0}]))
    assert drawing.alt == "Training loss falls from 5.00 at step 1 to 3.00 at step 9."
    picture = pictures.imread(io.BytesIO(drawing.encoded("png")))
    assert picture.shape[1] == 800  # 5 inches at 160 dots
    assert ((picture[..., 2] - picture[..., 0]) > 0.3).sum() > 300  # blue
    assert drawing.encoded("svg") == drawing.encoded("svg")  # no date in it


def test_the_figure_of_a_model_card_has_a_panel_for_each_group_of_curves(tmp_path):
    log = [{"step": step, "loss": 8.0 / step, "eval_loss": 5.2} for step in (1, 10, 20)]
    topology = [
        {"step": step, "sparsity": 0.6, "itop": 0.55, "overlap": 0.1, "active_neurons": 1.0} for step in (10, 20)
    ]
    path = tmp_path / "new" / "figure.png"
    full, dense = (pictures.imread(figures.training_figure(history, path)) for history in (log + topology, log))
    assert full.shape == dense.shape
    coloured = [np.array_split(picture[..., :3].std(axis=2) > 0.1, 3) for picture in (full, dense)]
    assert all(third.sum() > 100 for third in coloured[0])
    assert [third.any() for third in coloured[1]] == [True, False, False]


def test_series():
    log = [
        {"step": 8, "x": 3.0},
        {"step": 2, "x": 1},
        {"step": 4},
        {"step": 6, "x": float("nan")},
        {"step": 8, "x": 5.0},
    ]
    series = Series.of(log, "x")
    assert series == Series((2, 8), (1.0, 5.0))
    assert Series.of(log, "y") is None
    assert series.in_words("x", ".1f") == "x rises from 1.0 at step 2 to 5.0 at step 8"
    assert Series((3, 4), (1.001, 1.002)).in_words("x", ".1f") == "x is 1.0 at step 3 and 1.0 again at step 4"
    assert Series((3,), (2.0,)).in_words("x", ".1f") == "x is 2.0 at step 3"
    thinned = Series(tuple(range(1000)), tuple(float(i % 10) for i in range(1000))).thinned(100)
    assert len(thinned.steps) == 100
    assert set(thinned.values) == {4.5}


def test_ticks_are_round_steps():
    assert step_ticks(6).tick_values(0, 45).tolist() == [0, 10, 20, 30, 40, 50]

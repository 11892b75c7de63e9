"""What the benchmarks measure can still be measured: each of them in small."""

import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# benchmark → its call, and what there must be a figure of
CASES = {
    "checkpoint": (lambda run, place: run["measure"]("llama_demo", 0.9, 1)["links"], "write_seconds"),
    "inference": (lambda run, place: run["measure"]("llama_demo", 1, (1, 8), 2), "generate_ratio"),
    "link_prediction": (lambda run, place: run["measure"]((16, 16), 0.2, "BRF", 1, 1), "milliseconds"),
    "packed_size": (lambda run, place: run["measure"]("llama_demo", 0.9, 1, place), "over_formula"),
    "scaling": (lambda run, place: run["measure"]((32, 32), "rigl", 1), "seconds"),
    "topology_update": (lambda run, place: run["times"]("llama_demo", "rigl", 0.9, 16, 1), "plain_over_update"),
}


@pytest.mark.parametrize("benchmark", CASES)
def test_a_benchmark_runs(tmp_path, monkeypatch, benchmark):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    call, figure = CASES[benchmark]
    assert figure in call(runpy.run_path(str(BENCHMARKS / f"{benchmark}.py")), tmp_path)

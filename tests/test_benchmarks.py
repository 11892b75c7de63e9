"""What the benchmarks measure can still be measured: each of them in small."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# benchmark → its call, and what there must be a figure of
CASES = {
    "checkpoint": (lambda run, place: run["measure"]("llama_demo", 0.9, 1)["links"], "write_seconds"),
    "decode": (lambda run, place: run["measure"]("llama_demo", 2, 0.9, 2, 1, 1), "over_dense_fp32"),
    "degrees": (lambda run, place: run["measure"]("CHTs", 16, 24, 1, 0.8, 400)["end"], "rank"),
    "inference": (lambda run, place: run["measure"]("llama_demo", 1, (1, 8), 2), "generate_ratio"),
    "link_prediction": (lambda run, place: run["measure"]((16, 16), 0.2, "BRF", 1, 1), "milliseconds"),
    "packed_size": (lambda run, place: run["measure"]("llama_demo", 0.9, "none", 1, place), "over_formula"),
    "scaling": (lambda run, place: run["measure"]((32, 32), "rigl", 1), "seconds"),
    "topology_update": (lambda run, place: run["times"]("llama_demo", "rigl", 0.9, 16, 1), "plain_over_update"),
}
# of performance.py's groups: the results in small, by the modules' own options
SMALL = {
    "step": ("step", ["--models", "llama_demo/1", "--tokens", "1x8", "--ways", "masked", "links", "sparse", "csr"]),
    "mlp": ("mlp", ["--width", "32", "--batch", "2", "--threads", "1", "--ways", "masked", "links", "sparse", "csr"]),
}


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before, threads = set(sys.modules), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.mark.parametrize("benchmark", CASES)
def test_a_benchmark_runs(tmp_path, benchmark):
    call, figure = CASES[benchmark]
    assert figure in call(runpy.run_path(str(BENCHMARKS / f"{benchmark}.py")), tmp_path)


def small(group: str) -> dict:
    name, words = SMALL[group]
    module = importlib.import_module(name)
    arguments = module.options().parse_args([*words, "--steps", "1", "--repeats", "1"])
    if group == "mlp":
        return module.measure("adamw", 1, 0.9, arguments)
    return module.measure(arguments.models[0], arguments.tokens[0], 0.9, arguments)


def test_gini_of_degrees():
    gini = runpy.run_path(str(BENCHMARKS / "degrees.py"))["gini"]
    assert gini(torch.tensor([3, 3, 3])) == pytest.approx(0)
    # differences of the pairs: 1, 4, 3, each twice, and three zeros; half their mean, over the mean of 0, 1 and 4
    assert gini(torch.tensor([4, 0, 1])) == pytest.approx(16 / 9 / 2 / (5 / 3))


@pytest.mark.parametrize("group", SMALL)
def test_every_way_computes_the_same_and_the_page_reads_what_is_printed(group):
    result = json.loads(json.dumps(small(group)))
    assert {"masked", "links", "csr"} <= set(result["speedup"])
    assert result["losses_apart"] < 1e-5
    text = page_of(group, result)
    assert all(f"{value:.2f} ×" in text for value in [*result["speedup"].values(), result["bound"]])


def page_of(group: str, result: dict) -> str:
    result = {"torch": "2", "torch_capability": "AVX2", "numba_target": None, **result}
    record = {"group": group, "command": "python one.py", "result": result}
    return importlib.import_module("performance_tables").page(f"on {{{{machine}}}}\n\n{{{{{group}}}}}\n", [record])


def test_a_speed_up_is_the_median_of_each_rounds():
    compared = importlib.import_module("setups").compared
    found = compared({"dense": [2.0, 8.0, 3.0], "links": [1.0, 2.0, 3.0], "rest": [0.5, 1.0, 0.1]})
    assert found == {"speedup": {"links": 2.0}, "speedups": {"links": [1.0, 4.0]}, "bound": 8.0}


def test_numbers_of_tokens_are_sequences_of_at_most_256():
    sizes = importlib.import_module("step").sizes
    assert [sizes(text) for text in ("128", "256", "2048", "3x7")] == [(1, 128), (1, 256), (8, 256), (3, 7)]


def test_one_block_of_a_size_that_no_file_has():
    config = importlib.import_module("setups").model_config("llama_350m/1")
    assert (config.hidden_size, config.head_dim, config.num_hidden_layers, config.vocab_size) == (1024, 64, 1, 128)


def test_decoding_is_compared_with_what_is_dense():
    found = importlib.import_module("decode").measure("llama_demo", 1, 0.9, 1, 1, 1)
    text = page_of("decode", json.loads(json.dumps(found)))
    assert "| LLaMA-demo, 1 blocks | 90% | packed |" in text
    assert f"| {found['over_dense_fp32']:.2f} × |" in text


def test_an_update_is_compared_with_a_plain_one():
    result = {"benchmark": "topology_update", "model": "llama_60m", "method": "chtss", "sparsity": 0.9, "ratio": 0.256}
    seconds = {"update_seconds": 0.1234, "plain_seconds": 1.5, "plain_over_update": 12.16}
    row = "| LLaMA-60M | chtss | 90% | 0.123 | 1.5 | 12.16 × | 0.26 |"
    assert row in page_of("update", result | seconds)


def test_the_growth_with_size_is_the_exponent_of_a_power():
    scaling = importlib.import_module("scaling")
    assert scaling.exponent([1, 10, 100], [3, 3 * 10**1.5, 3 * 10**3]) == pytest.approx(1.5)
    found = scaling.growth(["llama_demo/1", "llama_60m/1"], ["links"], 0.9, "1x8", 1)
    assert found["weights"][1] == 4 * 512 * 512 + 3 * 512 * 1376
    assert all(name in page_of("exponents", found) for name in ("links, s", "update, s", "LLaMA-60M"))


@pytest.mark.parametrize("layer", ["csr", "sparselab"])
def test_other_ways_have_the_dense_gradients(layer):
    if layer == "sparselab":
        pytest.importorskip("sparselab", reason="pip install hf_chts[bench]; not for Python 3.10")
    ways = importlib.import_module("sparse_ways")
    mask = torch.tensor([[True, False, True], [False, False, False]])  # an empty row and an empty column
    weight, x = torch.tensor([[2.0, 9.0, -1.0], [9.0, 9.0, 9.0]]), torch.tensor([[1.0, 5.0, 3.0]], requires_grad=True)
    made = ways.REPLACEMENTS[layer](weight, mask)
    y = made(x)
    assert y.tolist() == [[-1.0, 0.0]]
    (y * torch.tensor([[10.0, 1.0]])).sum().backward()
    assert x.grad.tolist() == [[20.0, 0.0, -10.0]]
    (values,) = made.parameters()
    assert values.grad[values != 0].tolist() == [10.0, 30.0]


class TestPerformance:
    @pytest.fixture
    def performance(self, tmp_path, monkeypatch):
        module = importlib.import_module("performance")
        (tmp_path / "notes.md").write_text("{{memory}}\n")
        for name, file in {"RECORDS": "data/records.jsonl", "NOTES": "notes.md", "PAGE": "page.md"}.items():
            monkeypatch.setattr(module, name, tmp_path / file)
        monkeypatch.setattr(module, "ROOT", tmp_path)
        return module

    def job(self, performance, body: str, limit: int = 60):
        result = {"benchmark": "memory", "model": "llama_1b/1", "storage": "links", "sparsity": 0.95, "peak_mib": 7}
        text = json.dumps(json.dumps(result | {"all_bytes_per_weight": 1.25}))
        (performance.ROOT / "one.py").write_text(f"import os, sys, time\nprint({text}, flush=True)\n{body}\n")
        return performance.Job("memory", "PLAYED=1 python one.py", limit)

    def test_a_finished_command_is_not_run_again(self, performance):
        job = self.job(performance, "open('runs', 'a').write(os.environ['PLAYED'])")
        assert performance.run_all([job], 1, again=False) == performance.run_all([job], 1, again=False) == []
        assert (performance.ROOT / "runs").read_text() == "1"
        assert performance.run_all([job], 1, again=True) == []
        assert (performance.ROOT / "runs").read_text() == "11"
        assert len(performance.read()) == 2  # the result, and that the command has ended
        page = performance.PAGE.read_text()
        assert "| LLaMA-1B, 1 block | links | 95% | 1.25 | 7 |" in page
        assert "$ PLAYED=1 python one.py\n" in page

    @pytest.mark.parametrize(("body", "status"), [("sys.exit(3)", 3), ("time.sleep(60)", 124)])
    def test_what_fails_keeps_what_it_printed_and_is_run_again(self, performance, body, status):
        job = self.job(performance, body, limit=1 if status == 124 else 60)
        assert performance.run_all([job], 1, again=False) == [f"exit status {status}: PLAYED=1 python one.py"]
        assert f"# exit status {status}" in performance.PAGE.read_text()
        assert performance.run_all([self.job(performance, "")], 1, again=False) == []
        assert len(performance.read()) == 2

    def test_nothing_is_begun_when_the_time_is_over(self, performance):
        wrong = performance.run_all([self.job(performance, "")], 0, again=False)
        assert wrong == ["not run, the time is over: PLAYED=1 python one.py"]
        assert performance.read() == []

    def test_every_table_of_the_notes_has_jobs(self):
        module = importlib.import_module("performance")
        tables = importlib.import_module("performance_tables")
        notes = module.NOTES.read_text()
        for group in {job.group for job in module.JOBS}:
            assert group.split()[0] in tables.TABLES
            assert f"{{{{{group}}}}}" in notes

    def test_every_job_is_a_command_that_there_is(self):
        for job in importlib.import_module("performance").JOBS:
            words = job.command.split()
            script = words[words.index("python") + 1]
            assert (BENCHMARKS.parent / script).is_file()
            if script in ("benchmarks/step.py", "benchmarks/mlp.py"):
                importlib.import_module(Path(script).stem).options().parse_args(words[words.index(script) + 1 :])
